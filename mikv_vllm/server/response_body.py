"""The report in a response: at the top level of a JSON body, or of the last event of a stream."""

import json
from collections.abc import Callable
from typing import Any

from mikv_vllm.config import REPORT_FIELD
from mikv_vllm.server.reports import Report

CARRIER = "kv_transfer_params"
"""The field of vLLM's in which a report arrives."""

EVENT_END = b"\n\n"
DONE = b"data: [DONE]"
LAST_RESPONSES_EVENTS = (
    b"event: response.completed\n",
    b"event: response.incomplete\n",
    b"event: response.failed\n",
)
MAY_BE_LAST = (b'"finish_reason":"', b'"choices":[]')
"""Marks of an event that may be the last before ``[DONE]``: a choice ends, or the usage."""


def add_report(response: dict[str, Any], report: Report | None) -> bool:
    """Put a report at the top level of a response, and take it out of its carrier.

    Args:
        response: JSON object, changed in place.
        report: None takes the one that the carrier holds.

    Returns:
        Whether there was a report.
    """
    params = response.get(CARRIER)
    carried = params.pop(REPORT_FIELD, None) if isinstance(params, dict) else None
    if carried is not None and not params:
        response[CARRIER] = None
    report = report or carried
    if report is not None:
        response[REPORT_FIELD] = report
    return report is not None


def rewrite_json(body: bytes, report: Report | None) -> bytes:
    """A JSON response body with its report; as it is if there is none, or it is no object."""
    try:
        response = json.loads(body)
    except ValueError:
        return body
    if isinstance(response, dict) and add_report(response, report):
        return _dump(response)
    return body


class EventStream:
    """Puts a report into the last event of a stream of server-sent events.

    Nothing is held back but an event that may be the last, until the next one shows whether it
    is: the end of a choice, and the usage.

    Args:
        report: called when the last event is due.
    """

    def __init__(self, report: Callable[[], Report | None]) -> None:
        self._report = report
        self._partial = b""
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Take what vLLM sends; return what goes out now."""
        *events, self._partial = (self._partial + data).split(EVENT_END)
        return b"".join(self._next(event + EVENT_END) for event in events)

    def end(self) -> bytes:
        """What is left to go out when the stream ends."""
        left, self._held, self._partial = self._held + self._partial, b"", b""
        return left

    def _next(self, event: bytes) -> bytes:
        if event.startswith(b":"):  # a keep-alive comment
            return event
        held, self._held = self._held, b""
        if event.startswith(DONE):
            return self._with_report(held) + event
        if event.startswith(LAST_RESPONSES_EVENTS):
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
