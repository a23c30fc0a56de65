"""Block tables and sizes of a worker's compressed requests, in arrays.

The plan contains only the requests whose step is more than a new token in the last high record.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from mikv_vllm.engine.step_plan import DecodeStep
from mikv_vllm.kernels.batch import (
    DEMOTED,
    HIGH,
    LOW,
    LOW_END_LINE,
    MOVED,
    NEXT_LOW_END_LINE,
    PAGES,
    ROW_FIELDS,
    TOKEN,
    row_numbers,
)
from mikv_vllm.tiers.formats import LOW_RECORD_TOKENS, LowFormat
from mikv_vllm.tiers.plan import AppendStep, TierSizes

WIDTH = 16
"""Tables grow by this number of pages, which keeps the data behind them aligned on a GPU."""


def _whole(num_pages: int) -> int:
    return -(-num_pages // WIDTH) * WIDTH


class TierTables:
    """Block table and sizes of each compressed request.

    A row (:mod:`mikv_vllm.kernels.batch`) describes the current step or the next one. Unless the
    plan changes it, one token joins the last high record.
    """

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._rows = np.zeros((0, ROW_FIELDS), np.int32)
        self._tables = np.zeros((0, 0), np.int32)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def add(
        self, request_id: str, pages: Sequence[int], sizes: TierSizes, low_format: LowFormat
    ) -> None:
        """Add a request that was just compressed."""
        slot = self._free.pop() if self._free else len(self._slots)
        self._slots[request_id] = slot
        self._reserve(slot, len(pages))
        self._tables[slot, : len(pages)] = pages
        self._rows[slot] = row_numbers(0, sizes, AppendStep(1, 0, 0, 0, sizes), low_format)

    def discard(self, request_id: str) -> None:
        """Remove a request, if it is here."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)

    def change(self, request_id: str, step: DecodeStep) -> None:
        """Set the next step of a request, and add its new pages."""
        slot = self._slots[request_id]
        numbers = row_numbers(0, step.before, step.append, step.low_format)
        known = self._rows[slot, HIGH : LOW_END_LINE + 1].tolist()
        assert known == list(numbers[HIGH : LOW_END_LINE + 1]), (
            f"the plan and the worker disagree about {request_id}: {numbers}, {known}"
        )
        before, after = step.before.pages, step.append.after.pages
        self._reserve(slot, after)
        self._tables[slot, before:after] = step.new_pages
        self._rows[slot] = numbers

    def table(self, request_id: str) -> np.ndarray:
        """Page ids of a request in stream order, int32 ``[pages]``."""
        slot = self._slots[request_id]
        return self._tables[slot, : self._rows[slot, PAGES]]

    def slots(self, request_ids: Iterable[str]) -> np.ndarray:
        """Slots of requests, int64 ``[requests]``; -1 for those that are not compressed."""
        get = self._slots.get
        return np.array([get(request_id, -1) for request_id in request_ids], np.int64)

    def rows(self, slots: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows and tables of a step, as ``describe_rows`` does.

        The width of the tables is a multiple of ``WIDTH`` pages.

        Args:
            tokens: row of q, k, v and out of each slot, ``[slots]``.
        """
        rows = self._rows.take(slots, 0)
        rows[:, TOKEN] = tokens
        max_pages = rows[:, PAGES].max(initial=0)
        return rows, self._tables[slots, : _whole(max_pages)]

    def end_step(self, slots: np.ndarray, count: int = 1) -> None:
        """Update the sizes of requests after a step that added ``count`` tokens to each."""
        rows = self._rows[slots]
        rows[:, HIGH] += count - LOW_RECORD_TOKENS * rows[:, DEMOTED]
        rows[:, LOW] += rows[:, DEMOTED]
        rows[:, LOW_END_LINE] = rows[:, NEXT_LOW_END_LINE]
        rows[:, [MOVED, DEMOTED]] = 0
        self._rows[slots] = rows

    def _reserve(self, slot: int, num_pages: int) -> None:
        """Allocate space for a row with ``num_pages`` pages."""
        num_slots, most_pages = self._tables.shape
        if slot < num_slots and num_pages <= most_pages:
            return
        if slot >= num_slots:
            num_slots = max(16, 2 * slot)
        if num_pages > most_pages:
            most_pages = _whole(2 * num_pages)
        tables = np.zeros((num_slots, most_pages), np.int32)
        tables[: len(self._tables), : self._tables.shape[1]] = self._tables
        rows = np.zeros((num_slots, ROW_FIELDS), np.int32)
        rows[: len(self._rows)] = self._rows
        self._tables, self._rows = tables, rows
