"""From the engine's per-sequence reports to one report per request.

The scheduler attaches a report to the last output of every sequence. vLLM's frontend keeps only
one of them per prompt (n > 1 loses the others), and none in a stream, so they are collected
where all pass: in front of the ``OutputProcessor`` of this process.
"""

from collections.abc import Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from mikv_vllm.config import REPORT_FIELD

if TYPE_CHECKING:
    from vllm.v1.engine.output_processor import OutputProcessor

Report = dict[str, Any]
"""One report, as the scheduler makes it."""

SUMMED = ("kv_tokens", "high_tokens", "low_tokens", "kv_bytes", "uncompressed_kv_bytes")


class ReportGroup:
    """Reports of the sequences that belong to one request, the latest of each."""

    def __init__(self) -> None:
        self._by_sequence: dict[str, Report] = {}

    def add(self, sequence_id: str, report: Report) -> None:
        """Take the report of one sequence; a later one replaces it."""
        self._by_sequence[sequence_id] = report

    def total(self) -> Report | None:
        """One report for all sequences, or None if there is none yet."""
        return sum_reports(self._by_sequence.values()) if self._by_sequence else None


current_group: ContextVar[ReportGroup | None] = ContextVar("current_group", default=None)
"""Where sequences that are started in this context report to. The middleware sets it for each
HTTP request; tasks and generators of the request inherit it."""


def sum_reports(reports: Iterable[Report]) -> Report:
    """Tokens and bytes summed, and the ratio that they make; the first low format that there is."""
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


def collect_reports(processor: "OutputProcessor") -> None:
    """Make an ``OutputProcessor`` hand every report to its request's group.

    The final ``RequestOutput`` of a prompt with n > 1 then carries the sum over its sequences.
    """
    groups: WeakKeyDictionary[Any, ReportGroup] = WeakKeyDictionary()
    add_request, process_outputs = processor.add_request, processor.process_outputs

    def add_and_group(request: Any, *args: Any, **kwargs: Any) -> None:
        add_request(request, *args, **kwargs)
        state = processor.request_states[request.request_id]
        owner = state.parent_req or state
        if owner not in groups:
            groups[owner] = current_group.get() or ReportGroup()

    def collect_and_process(outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            params = output.kv_transfer_params
            if not params or REPORT_FIELD not in params:
                continue
            state = processor.request_states.get(output.request_id)
            if state is None:
                continue  # aborted meanwhile
            group = groups[state.parent_req or state]
            group.add(output.request_id, params[REPORT_FIELD])
            if state.parent_req is not None:
                output.kv_transfer_params = params | {REPORT_FIELD: group.total()}
        return process_outputs(outputs, *args, **kwargs)

    processor.add_request = add_and_group
    processor.process_outputs = collect_and_process
