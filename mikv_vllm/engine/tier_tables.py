"""Block tables and sizes of a worker's compressed requests, in arrays.

The plan contains only the requests whose step is more than a new token in the high tier.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from mikv_vllm.engine.step_plan import BlockTable, DecodeStep, ExtendStep
from mikv_vllm.kernels.batch import (
    ACCEPTED,
    BLOCKS,
    DEMOTED,
    HIGH,
    LOW,
    LOW_END_LINE,
    PAGES,
    QUERIES,
    ROW_FIELDS,
    TOKEN,
    round_up,
    row_numbers,
)
from mikv_vllm.tiers.blocks import EMPTY, TailStep, block_tokens
from mikv_vllm.tiers.formats import (
    HIGH_RECORD_TOKENS,
    LINE_BYTES,
    LOW_RECORD_TOKENS,
    LowFormat,
    TierGeometry,
)
from mikv_vllm.tiers.plan import TierSizes

WIDTH = 16
"""Tables grow by this number of pages, which keeps the data behind them aligned on a GPU."""


class TierTables:
    """Blocks of each compressed request: tables, sizes and low formats.

    A row's numbers are those of the step that comes next or runs now
    (:mod:`mikv_vllm.kernels.batch`): unless the plan changes them, one token joins the high tier of
    the last block, and the other blocks are only read.
    """

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._counts = np.zeros(0, np.int32)
        self._rows = np.zeros((0, 0, ROW_FIELDS), np.int32)
        self._tables = np.zeros((0, 0, 0), np.int32)
        self._formats: dict[int, list[LowFormat]] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, request_id: str, blocks: Sequence[BlockTable]) -> None:
        """Add a request with these blocks."""
        slot = self._free.pop() if self._free else len(self._slots)
        self._slots[request_id] = slot
        self._reserve(slot, len(blocks), max(len(block.pages) for block in blocks))
        self._counts[slot] = 0
        self._formats[slot] = []
        for block in blocks:
            self._add_block(slot, block)

    def _add_block(self, slot: int, block: BlockTable) -> None:
        """Add a block to a request; the block before it is only read from now on."""
        index = self._counts[slot]
        self._reserve(slot, index + 1, len(block.pages))
        if index:
            self._rows[slot, index - 1, BLOCKS] = 0
        step = TailStep(1, (), False, 0, block.sizes)
        numbers = row_numbers(0, block.sizes, step, block.low_format, index + 1, slot=slot)
        self._rows[slot, index] = numbers
        self._tables[slot, index, : len(block.pages)] = block.pages
        self._formats[slot].append(block.low_format)
        self._counts[slot] = index + 1

    def discard(self, request_id: str) -> None:
        """Remove a request, if it is here."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)
            self._counts[slot] = 0
            del self._formats[slot]

    def change(self, request_id: str, step: DecodeStep) -> None:
        """Set what the request's last block does in the next step, and add its new pages."""
        slot = self._slots[request_id]
        if step.begins:
            self._add_block(slot, BlockTable((), EMPTY, step.low_format))
        index = self._counts[slot] - 1
        accepted = self._rows[slot, index, ACCEPTED]
        numbers = row_numbers(
            0, step.before, step.append, step.low_format, index + 1, accepted, slot
        )
        num_pages, *known = self._rows[slot, index, PAGES : LOW + 1].tolist()
        assert known == list(numbers[HIGH : LOW + 1]), (
            f"the plan and the worker disagree about {request_id}: {numbers}, {known}"
        )
        if step.new_pages:
            known = self._tables[slot, index, :num_pages].tolist()
            pages = step.append.insert(known, step.new_pages)
            self._reserve(slot, index + 1, len(pages))
            self._tables[slot, index, : len(pages)] = pages
        self._rows[slot, index] = numbers

    def seal(self, request_id: str, block: BlockTable) -> None:
        """The last block of a request was written anew in its step."""
        slot = self._slots[request_id]
        self._counts[slot] -= 1
        self._formats[slot].pop()
        self._add_block(slot, block)

    def blocks(self, request_id: str) -> list[BlockTable]:
        """Blocks of a request, before this step."""
        slot = self._slots[request_id]
        blocks = []
        for index, low_format in enumerate(self._formats[slot]):
            pages, high, low, line = self._rows[slot, index, PAGES : LOW_END_LINE + 1].tolist()
            table = tuple(self._tables[slot, index, :pages].tolist())
            blocks.append(
                BlockTable(table, TierSizes(pages, high, low, line * LINE_BYTES), low_format)
            )
        return blocks

    def begun(self, request_ids: Iterable[str]) -> tuple[list[int], list[int]]:
        """First pages of the last block but one, and of the last block, of each request."""
        sources, targets = [], []
        for request_id in request_ids:
            slot = self._slots[request_id]
            last = self._counts[slot] - 1
            sources.append(int(self._tables[slot, last - 1, 0]))
            targets.append(int(self._tables[slot, last, 0]))
        return sources, targets

    def slots(self, request_ids: Iterable[str]) -> np.ndarray:
        """Slots of requests, int64 ``[requests]``; -1 for those that are not compressed."""
        get = self._slots.get
        return np.array([get(request_id, -1) for request_id in request_ids], np.int64)

    def rows(self, slots: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the kernels read of a step: rows and tables, as ``describe_rows`` returns them.

        A row for each block; those of a request are consecutive. Tables are ``WIDTH`` pages wide,
        or a multiple.

        Args:
            tokens: row of q, k, v and out of each slot, ``[slots]``.
        """
        counts = self._counts[slots]
        chosen = np.arange(self._rows.shape[1]) < counts[:, None]
        rows = self._rows[slots][chosen]
        rows[:, TOKEN] = np.repeat(tokens, counts)
        max_pages = rows[:, PAGES].max(initial=0)
        return rows, self._tables[slots][chosen][:, : round_up(max_pages, WIDTH)]

    def draft_rows(
        self, slots: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, geometry: TierGeometry
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the kernels read in a later pass of draft layers, after the step.

        A pass appends one drafted token to the tail, where the next step writes again. The tables
        do not change.

        Args:
            tokens: row of q, k, v and out of each slot, ``[slots]``.
            lengths: tokens before the drafted one, rejected ones not included, ``[slots]``; 0 if
                none may join.

        Returns:
            Rows and tables, as :meth:`rows` returns them, of the slots whose tail has room in its
            pages; and whether each slot is one of them, bool ``[slots]``.
        """
        last = self._counts[slots] - 1
        tails = self._rows[slots, last]
        blocks = self._rows[slots]
        counts = blocks[:, :, HIGH] + LOW_RECORD_TOKENS * blocks[:, :, LOW]
        counts *= np.arange(counts.shape[1]) <= last[:, None]
        surplus = counts.sum(1) - lengths
        high = tails[:, HIGH] - surplus
        num_tokens = counts[np.arange(len(slots)), last] - surplus
        record_bytes = [geometry.low(self._formats[slot][-1]).num_bytes for slot in slots.tolist()]
        low_begin = LINE_BYTES * tails[:, LOW_END_LINE] - tails[:, LOW] * record_bytes
        most_high = HIGH_RECORD_TOKENS * (
            (low_begin - geometry.header_bytes) // geometry.high.num_bytes
        )
        is_open = (lengths > 0) & (num_tokens < block_tokens(geometry.block_size))
        has_room = is_open & (high >= 0) & (high < most_high)
        rows, tables = self.rows(slots[has_room], tokens[has_room])
        ends = np.flatnonzero(rows[:, BLOCKS])
        rows[ends, HIGH] = high[has_room]
        rows[ends, ACCEPTED] = 0
        return rows, tables, has_room

    def verify(self, request_id: str, accepted: int, rejected: int) -> None:
        """Set what became of the drafts of a request's last step."""
        slot = self._slots[request_id]
        row = self._rows[slot, self._counts[slot] - 1]
        row[HIGH] -= rejected
        row[ACCEPTED] = accepted

    def end_step(self, slots: np.ndarray) -> None:
        """Requests have run their step, in which a token and its drafts joined each."""
        last = slots, self._counts[slots] - 1
        rows = self._rows[last]
        rows[:, HIGH] += rows[:, QUERIES] - LOW_RECORD_TOKENS * rows[:, DEMOTED]
        rows[:, LOW] += rows[:, DEMOTED]
        rows[:, [DEMOTED, ACCEPTED]] = 0
        rows[:, QUERIES] = 1
        self._rows[last] = rows

    def extend(self, request_id: str, step: ExtendStep) -> None:
        """The request has run a step in which a chunk of its prompt joined."""
        slot = self._slots[request_id]
        for change in step.changes:
            self.change(request_id, change)
            after = change.append.after
            unchanged = TailStep(1, (), False, 0, after)
            count = self._counts[slot]
            numbers = row_numbers(0, after, unchanged, change.low_format, count, slot=slot)
            self._rows[slot, count - 1] = numbers
            if change.sealed:
                self.seal(request_id, change.sealed)

    def _reserve(self, slot: int, num_blocks: int, num_pages: int) -> None:
        """Make room for a slot with ``num_blocks`` blocks of ``num_pages`` pages."""
        num_slots, most_blocks, most_pages = self._tables.shape
        if slot < num_slots and num_blocks <= most_blocks and num_pages <= most_pages:
            return
        if slot >= num_slots:
            num_slots = max(16, 2 * slot)
        if num_blocks > most_blocks:
            most_blocks = 2 * num_blocks
        if num_pages > most_pages:
            most_pages = round_up(num_pages, WIDTH)
        counts, rows, tables = self._counts, self._rows, self._tables
        self._counts = np.zeros(num_slots, np.int32)
        self._rows = np.zeros((num_slots, most_blocks, ROW_FIELDS), np.int32)
        self._tables = np.zeros((num_slots, most_blocks, most_pages), np.int32)
        self._counts[: len(counts)] = counts
        self._rows[: len(rows), : rows.shape[1]] = rows
        self._tables[: len(tables), : tables.shape[1], : tables.shape[2]] = tables
