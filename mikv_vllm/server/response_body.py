"""Puts the report into a response: into a JSON body, or into the last event of a stream."""

import json
from collections.abc import Callable
from typing import Any

from mikv_vllm.config import REPORT_FIELD
from mikv_vllm.server.reports import Report

CARRIER = "kv_transfer_params"
"""The field of vLLM's responses that contains a report."""

EVENT_END = b"\n\n"
DONE = b"data: [DONE]"
LAST_EVENTS = (
    b"event: response.completed\n",
    b"event: response.incomplete\n",
    b"event: response.failed\n",
    b"event: message_delta\n",
)
"""Events with the final usage, of ``/v1/responses`` and of ``/v1/messages``."""
MAY_BE_LAST = (b'"finish_reason":"', b'"choices":[]')
"""Text in an event that may be the last before ``[DONE]``: the end of a choice, or the usage."""


def add_report(response: dict[str, Any], report: Report | None) -> bool:
    """Set :data:`~mikv_vllm.config.REPORT_FIELD` of a response, and remove it from its carrier.

    The report is also added to ``usage``, which many clients keep when they drop unknown fields.

    Args:
        response: JSON object, changed in place.
        report: None for the report in the carrier, if there is one.

    Returns:
        Whether the response has a report now.
    """
    params = response.get(CARRIER)
    carried = params.pop(REPORT_FIELD, None) if isinstance(params, dict) else None
    if carried is not None and not params:
        response[CARRIER] = None
    report = report or carried
    if report is not None:
        response[REPORT_FIELD] = report
        if isinstance(usage := response.get("usage"), dict):
            usage[REPORT_FIELD] = report
    return report is not None


def rewrite_json(body: bytes, report: Report | None) -> tuple[bytes, Report | None]:
    """Add a report to the JSON body of a response.

    Args:
        body: body of the response.
        report: None for the report in the carrier, if there is one.

    Returns:
        The new body and the report; ``body`` itself and None if there is no report or the body is
        not a JSON object.
    """
    try:
        response = json.loads(body)
    except ValueError:
        return body, None
    if isinstance(response, dict) and add_report(response, report):
        return _dump(response), response[REPORT_FIELD]
    return body, None


def header_value(report: Report) -> str:
    """Return a report as the value of a header: JSON on one line."""
    return json.dumps(report, separators=(",", ":"))


class EventStream:
    """Adds a report to the last event of a stream of server-sent events.

    Only an event that may be the last one is delayed, until the next event arrives. Such an event
    ends a choice or contains the usage. All other events pass through immediately.

    Args:
        report: returns the report; called when the last event is known.
    """

    def __init__(self, report: Callable[[], Report | None]) -> None:
        self._report = report
        self._partial = b""
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Process bytes of vLLM's stream, and return the bytes to send now."""
        *events, self._partial = (self._partial + data).split(EVENT_END)
        return b"".join(self._next(event + EVENT_END) for event in events)

    def end(self) -> bytes:
        """Return the delayed bytes, to be sent when the stream ends."""
        left, self._held, self._partial = self._held + self._partial, b"", b""
        return left

    def _next(self, event: bytes) -> bytes:
        if event.startswith(b":"):  # a keep-alive comment
            return event
        held, self._held = self._held, b""
        if event.startswith(DONE):
            return self._with_report(held) + event
        if event.startswith(LAST_EVENTS):
            return held + self._with_report(event)
        if any(mark in event for mark in MAY_BE_LAST):
            self._held = event
            return held
        return held + event

    def _with_report(self, event: bytes) -> bytes:
        head, mark, data = event.partition(b"data: ")
        if not mark:
            return event
        content = json.loads(data)
        report = self._report()
        response = content.get("response")
        if isinstance(response, dict):
            add_report(response, report)
            report = response.get(REPORT_FIELD)
        if not add_report(content, report):
            return event
        return head + mark + _dump(content) + EVENT_END


def _dump(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
