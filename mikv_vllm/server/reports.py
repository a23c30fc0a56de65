"""Collects the reports of all sequences of a request and combines them into one report.

The scheduler attaches a report to the last output of every sequence. vLLM's frontend keeps only one
report for each prompt (with ``n > 1`` the others are lost), and a stream contains none. Reports are
therefore collected before the outputs enter the ``OutputProcessor`` of this process.
"""

from collections.abc import Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from mikv_vllm.config import REPORT_FIELD
from mikv_vllm.server.vllm_hooks import observe_outputs

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor

Report = dict[str, Any]
"""One report as the scheduler creates it, by field name."""

SUMMED = (
    "kv_tokens",
    "high_tokens",
    "low_tokens",
    "reused_tokens",
    "kv_bytes",
    "shared_kv_bytes",
    "uncompressed_kv_bytes",
)


class ReportGroup:
    """The latest report of each sequence of one request."""

    def __init__(self) -> None:
        self._by_sequence: dict[str, Report] = {}

    def add(self, sequence_id: str, report: Report) -> None:
        """Store the report of one sequence, in place of an earlier report of the same sequence."""
        self._by_sequence[sequence_id] = report

    def total(self) -> Report | None:
        """Return one report for all sequences, or None if there are no reports yet."""
        return sum_reports(self._by_sequence.values()) if self._by_sequence else None


class HttpRequest(ReportGroup):
    """The ratio and the reports of one HTTP request.

    Args:
        ratio: ratio of all its sequences; None for the server's default.
        reports_native: whether there is a report if nothing was compressed and ``requested_ratio``
            is 1.
        is_stored: whether the server may return the answer again later. Its report stays in the
            ``kv_transfer_params`` of the stored answer.
    """

    def __init__(self, ratio: float | None, reports_native: bool, is_stored: bool) -> None:
        super().__init__()
        self.ratio = ratio
        self.is_stored = is_stored
        self._reports_native = reports_native

    def total(self) -> Report | None:
        """Return one report for all sequences, or None if there are none that have to be shown."""
        report = super().total()
        if report is None or self._reports_native or report["requested_ratio"] > 1:
            return report
        return None


current_request: ContextVar[HttpRequest | None] = ContextVar("current_request", default=None)
"""The HTTP request that starts sequences in this context. The middleware sets it; tasks and
generators of the request inherit it."""


def sum_reports(reports: Iterable[Report]) -> Report:
    """Combine the reports of several sequences into one.

    Tokens and bytes are sums, and the achieved ratio follows from them. ``low_format`` is that of
    the first compressed sequence. The other fields are those of the first report.
    """
    reports = list(reports)
    if len(reports) == 1:
        return reports[0]
    total = dict(reports[0])
    for field in SUMMED:
        total[field] = sum(report[field] for report in reports)
    stored = total["kv_bytes"]
    total["achieved_ratio"] = round(total["uncompressed_kv_bytes"] / stored, 4) if stored else 1.0
    formats = (report["low_format"] for report in reports)
    total["low_format"] = next((name for name in formats if name is not None), None)
    return total


def collect_reports(processor: "OutputProcessor", over_http: bool = False) -> None:
    """Make an ``OutputProcessor`` add every report to the group of its request.

    The final ``RequestOutput`` of a prompt with ``n > 1`` then contains the sum over its sequences.

    Args:
        processor: changed in place.
        over_http: whether reports reach the user through :data:`current_request`. They are then
            removed from ``kv_transfer_params``, except those of stored answers.
    """
    groups: WeakKeyDictionary[Any, ReportGroup] = WeakKeyDictionary()

    def assign_group(request: "EngineCoreRequest") -> None:
        state = processor.request_states[request.request_id]
        owner = state.parent_req or state
        if owner not in groups:
            groups[owner] = current_request.get() or ReportGroup()

    def collect(outputs: list["EngineCoreOutput"]) -> None:
        for output in outputs:
            params = output.kv_transfer_params
            if not params or REPORT_FIELD not in params:
                continue
            state = processor.request_states.get(output.request_id)
            if state is None:
                continue  # the request was aborted in the meantime
            group = groups[state.parent_req or state]
            group.add(output.request_id, params[REPORT_FIELD])
            kept = not over_http or (isinstance(group, HttpRequest) and group.is_stored)
            report = group.total() if kept else None
            others = {name: value for name, value in params.items() if name != REPORT_FIELD}
            shown = others if report is None else others | {REPORT_FIELD: report}
            output.kv_transfer_params = shown or None

    observe_outputs(processor, assign_group, collect)
