"""Tiered blocks: compression ratio -> low format -> sizes of the blocks of a request.

A compressed request is a list of *sealed blocks*, which never change, and one *tail*. A block
covers :func:`block_tokens` consecutive tokens, or fewer if it is sealed at a branch. Each block has
a stream of its own (:mod:`mikv_vllm.tiers.formats`), whose low tier ends at the end of the stream.
The stream of a tail grows: when the tiers meet and the ratio allows for another page, one is
inserted between them. A page that both tiers are in is copied, so that each tier has its part::

    page         0        1        2
    tail     | high   | hi lo  |           high grows up, low grows down
    longer   | high   | hi     |     lo |  page 1 was copied, and both copies have room

So no record ever moves within its page. When the tail is full, it is written anew as a sealed
block, which has fewer bytes: the newest tokens receive most of the attention, so the pages that
sealed blocks save are worth more in the tail. All sizes are pure functions of the ratio, the
position of the block in the request, and the number of its tokens. The scheduler computes them;
nothing here reads a key or a value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TypeVar

from mikv_vllm.tiers.formats import (
    HIGH_RECORD_TOKENS,
    LADDER,
    LOW_RECORD_TOKENS,
    LowFormat,
    TierGeometry,
)
from mikv_vllm.tiers.plan import LEAST_HIGH_FRACTION, TierSizes

Page = TypeVar("Page")
"""A page of the pool, or its number."""
EMPTY = TierSizes(pages=0, high_tokens=0, low_records=0, low_end_bytes=0)
"""Sizes of a tail without tokens."""
BLOCK_NATIVE_PAGES = 64
"""Native pages that the tokens of a sealed block would take; measured in
docs/notes/quality-history.md."""
SAVED_PAGES = 1
"""Pages that a sealed block takes less than its share of the ratio."""
MOST_SAVED_PAGES = 4
"""Pages that the sealed blocks of a request save together, at most. The tail gets them; measured in
docs/notes/quality-history.md."""
LEAST_IMPORTANT = 16
"""Tokens besides the recent ones that stay in the high tier of a tail, at least."""


def block_tokens(block_size: int) -> int:
    """Tokens of a sealed block, for native pages of ``block_size`` tokens."""
    return BLOCK_NATIVE_PAGES * block_size


@dataclass(frozen=True)
class BlockForm:
    """Low format and sizes of a block."""

    low_format: LowFormat
    sizes: TierSizes


@dataclass(frozen=True)
class TailStep:
    """How a tail changes when tokens join it."""

    new_tokens: int
    """Tokens that join: 1 in a decode step."""
    new_positions: tuple[int, ...]
    """Positions in the longer stream of the pages that are inserted; consecutive."""
    is_split: bool
    """Whether the last of them begins as a copy of the page before the first of them."""
    demoted_records: int
    """Times 32 high tokens that become one low record."""
    after: TierSizes
    """Sizes afterwards."""

    def insert(self, pages: Sequence[Page], new: Sequence[Page]) -> list[Page]:
        """Return the pages of the stream after the step.

        Args:
            pages: those before it.
            new: one for each of :attr:`new_positions`.
        """
        first = self.new_positions[0] if new else 0
        return [*pages[:first], *new, *pages[first:]]


@dataclass(frozen=True)
class BlockPlanner:
    """Sizes of the blocks of a request, for one ratio.

    Args:
        geometry: sizes of the model's records and pages.
        ratio: requested compression ratio, above 1.
        recent: newest tokens of a tail that are never demoted.
        ladder: low formats, richest first.
    """

    geometry: TierGeometry
    ratio: float
    recent: int
    ladder: tuple[LowFormat, ...] = LADDER

    @cached_property
    def block_tokens(self) -> int:
        """Tokens of a sealed block."""
        return block_tokens(self.geometry.block_size)

    def budget(self, num_tokens: int) -> int:
        """Pages that bring the first ``num_tokens`` tokens of a request closest to the ratio."""
        return math.floor(num_tokens / (self.geometry.block_size * self.ratio) + 0.5)

    def native_pages(self, num_tokens: int) -> int:
        """Pages that ``num_tokens`` uncompressed tokens take."""
        return -(-num_tokens // self.geometry.block_size)

    def sealed_budget(self, num_tokens: int) -> int:
        """Pages for the sealed blocks of the first ``num_tokens`` tokens of a request."""
        saved = num_tokens // self.block_tokens * self._saved_pages
        return self.budget(num_tokens) - min(saved, MOST_SAVED_PAGES)

    @cached_property
    def _saved_pages(self) -> int:
        """Pages that each sealed block saves, as far as the ladder reaches."""
        share = math.floor(BLOCK_NATIVE_PAGES / self.ratio)
        return max(0, min(SAVED_PAGES, share - self._form(1).sizes.pages))

    def sealed_form(self, start: int) -> BlockForm:
        """The form of a sealed block with all its tokens.

        Args:
            start: position of its first token in the request.
        """
        end = start + self.block_tokens
        return self._form(self.sealed_budget(end) - self.sealed_budget(start))

    def tail_form(self, start: int) -> BlockForm:
        """The form of a tail when its last token has joined, before it is sealed.

        A shorter tail has the same low format.

        Args:
            start: position of its first token in the request.
        """
        return self._form(self.budget(start + self.block_tokens) - self.sealed_budget(start))

    def _form(self, pages: int) -> BlockForm:
        pages = max(1, pages)
        if pages not in self._forms:
            self._forms[pages] = self._richest_form(pages)
        return self._forms[pages]

    @cached_property
    def _forms(self) -> dict[int, BlockForm]:
        """Forms of blocks with all their tokens, by the pages that they may take."""
        return {}

    def _richest_form(self, pages: int) -> BlockForm:
        """The richest form of a block in ``pages`` pages; if no format fits, in one page more."""
        geometry, tokens = self.geometry, self.block_tokens
        end = pages * geometry.page_bytes
        for low_format in self.ladder:
            record = geometry.low(low_format).num_bytes
            # All high first: every low record then replaces two high records.
            excess = geometry.high_bytes(tokens) - end
            low = max(0, math.ceil(excess / (2 * geometry.high.num_bytes - record)))
            high = tokens - LOW_RECORD_TOKENS * low
            form = BlockForm(low_format, TierSizes(pages, high, low, end))
            if high >= self.least_high(tokens) and self._can_be_filled(form):
                return form
        return self._richest_form(pages + 1)

    def least_high(self, num_tokens: int) -> int:
        """High tokens of a block that demotion leaves: the recent ones and some important ones."""
        return self.recent + max(LEAST_IMPORTANT, int(LEAST_HIGH_FRACTION / 2 * num_tokens))

    def tail(self, start: int, num_tokens: int) -> TierSizes:
        """Sizes of a tail if ``num_tokens`` tokens, fewer than a whole block, join it at once."""
        limit = self._limit(start, num_tokens)
        return self._choose(start, num_tokens, EMPTY, limit, self.least_high(num_tokens))

    def block(self, start: int, num_tokens: int) -> BlockForm:
        """The form of a block that is written at once: sealed if it is whole, else a tail."""
        if num_tokens == self.block_tokens:
            return self.sealed_form(start)
        return BlockForm(self.tail_form(start).low_format, self.tail(start, num_tokens))

    def compress(self, num_tokens: int) -> list[BlockForm] | None:
        """The blocks of a native request, a tail last; None if no page is saved."""
        blocks = self.blocks(num_tokens)
        pages = sum(block.sizes.pages for block in blocks)
        return blocks if pages < self.native_pages(num_tokens) else None

    def starts(self, num_tokens: int) -> range:
        """Positions of the first tokens of :meth:`blocks`."""
        return range(0, num_tokens, self.block_tokens)

    def blocks(self, num_tokens: int) -> list[BlockForm]:
        """All blocks of a request that is compressed at once."""
        whole, starts = self.block_tokens, self.starts(num_tokens)
        return [self.block(start, min(whole, num_tokens - start)) for start in starts]

    def most_pages(self, num_tokens: int) -> int:
        """Pages that a request takes until it holds ``num_tokens`` tokens.

        A tail takes the most just before it is sealed.
        """
        pages = [form.sizes.pages for form in self.blocks(num_tokens)]
        whole = num_tokens // self.block_tokens
        if not whole:
            return sum(pages)
        full = self.tail_form((whole - 1) * self.block_tokens).sizes.pages
        return max(sum(pages), sum(pages[: whole - 1]) + full)

    def append(self, start: int, sizes: TierSizes) -> TailStep:
        """Plan how a tail takes one token."""
        if sizes.num_tokens + 1 < self.block_tokens and sizes.high_tokens % HIGH_RECORD_TOKENS:
            return TailStep(1, (), False, 0, replace(sizes, high_tokens=sizes.high_tokens + 1))
        return self.extend(start, sizes, 1)

    def free_slots(self, start: int, sizes: TierSizes) -> int:
        """Tokens that can join the high tier of a tail before the tiers meet.

        As long as they do not meet, nothing demotes, and no page is inserted.
        """
        low_begin = sizes.low_end_bytes - self._low_bytes(self.tail_form(start), sizes)
        records = (low_begin - self.geometry.header_bytes) // self.geometry.high.num_bytes
        return HIGH_RECORD_TOKENS * records - sizes.high_tokens

    def append_drafts(self, start: int, sizes: TierSizes, capacity: int, most: int) -> TailStep:
        """Plan how a tail takes one token, and drafts after it.

        Every token of an accepted draft has to find the tiers that it would find without drafts.
        Therefore a draft joins only if it demotes nothing. It does not fill the block either,
        because a full block is sealed.

        Args:
            capacity: tokens with which the block is sealed.
            most: number of drafts. Fewer may join.
        """
        first = self.append(start, sizes)
        after, joined = first.after, 0
        while joined < most and after.num_tokens + 1 < capacity:
            step = self.append(start, after)
            if step.demoted_records:
                break
            after, joined = step.after, joined + 1
        return self._tail_step(start, sizes, after, 1 + joined)

    def extend(self, start: int, sizes: TierSizes, count: int) -> TailStep:
        """Plan how a tail takes ``count`` tokens, up to a whole block, and is not sealed yet."""
        num_tokens = sizes.num_tokens + count
        assert num_tokens <= self.block_tokens, "these tokens belong to the next block"
        if num_tokens == self.block_tokens:
            after = self.tail_form(start).sizes
        else:
            limit = max(self._limit(start, num_tokens), sizes.pages)
            after = self._choose(start, num_tokens, sizes, limit, self.least_high(num_tokens))
        return self._tail_step(start, sizes, after, count)

    def seal(self, start: int, sizes: TierSizes, count: int) -> TailStep:
        """Plan how a block takes its last ``count`` tokens and is sealed in the same step.

        It is written anew, in its present pages as far as it needs them.
        """
        after = self.sealed_form(start).sizes
        assert sizes.num_tokens + count == after.num_tokens, "the block is not full"
        new_positions = tuple(range(sizes.pages, after.pages))
        demoted = after.low_records - sizes.low_records
        return TailStep(count, new_positions, False, demoted, after)

    def _tail_step(self, start: int, sizes: TierSizes, after: TierSizes, count: int) -> TailStep:
        """The step in which ``count`` tokens change a tail from ``sizes`` to ``after``."""
        page_bytes = self.geometry.page_bytes
        high_bytes = self.geometry.high_bytes(sizes.high_tokens) if sizes.pages else 0
        first = -(-high_bytes // page_bytes)
        new_positions = tuple(range(first, first + after.pages - sizes.pages))
        low_begin = sizes.low_end_bytes - self._low_bytes(self.tail_form(start), sizes)
        has_both = sizes.low_records > 0 and low_begin < first * page_bytes
        demoted = after.low_records - sizes.low_records
        return TailStep(count, new_positions, bool(new_positions) and has_both, demoted, after)

    def lengthen(self, sizes: TierSizes, pages: int) -> TierSizes:
        """Sizes of a block whose stream has ``pages`` pages."""
        return replace(sizes, pages=pages, low_end_bytes=pages * self.geometry.page_bytes)

    def _choose(
        self, start: int, num_tokens: int, before: TierSizes, limit: int, least_high: int
    ) -> TierSizes:
        """The sizes with the fewest low records that take at most ``limit`` pages.

        If there are none, those that take the fewest pages. At least ``least_high`` tokens stay
        high, or :attr:`recent` and :data:`LEAST_IMPORTANT` if no other sizes fit. No record and no
        page of ``before`` is removed.
        """
        form, best = self.tail_form(start), None
        fewest = self.recent + LEAST_IMPORTANT
        for low in range(before.low_records, form.sizes.low_records + 1):
            high = num_tokens - LOW_RECORD_TOKENS * low
            if low > before.low_records and (high < fewest or (best and high < least_high)):
                break
            sizes = replace(form.sizes, high_tokens=high, low_records=low)
            num_bytes = self.geometry.high_bytes(high) + self._low_bytes(form, sizes)
            pages = max(before.pages, -(-num_bytes // self.geometry.page_bytes))
            if pages <= form.sizes.pages and (best is None or pages < best.pages):
                best = self.lengthen(sizes, pages)
            if pages <= limit:
                break
        assert best, f"no sizes for a tail of {num_tokens} tokens"
        return best

    def _low_bytes(self, form: BlockForm, sizes: TierSizes) -> int:
        return sizes.low_records * self.geometry.low(form.low_format).num_bytes

    def _limit(self, start: int, num_tokens: int) -> int:
        """Pages that a tail of ``num_tokens`` tokens should take."""
        return max(1, self.budget(start + num_tokens) - self.sealed_budget(start))

    def _fits(self, form: BlockForm, sizes: TierSizes) -> bool:
        high_bytes = self.geometry.high_bytes(sizes.high_tokens)
        return high_bytes + self._low_bytes(form, sizes) <= sizes.low_end_bytes

    def _can_be_filled(self, form: BlockForm) -> bool:
        """Whether a tail can grow to ``form`` token by token, and keeps its important tokens.

        Before its last demotion, a tail has one high record more and one low record less.
        """
        sizes, spare = form.sizes, form.sizes.high_tokens - self.recent - LEAST_IMPORTANT
        if not sizes.low_records or spare >= LOW_RECORD_TOKENS:
            return True
        full = replace(
            sizes,
            high_tokens=sizes.high_tokens + HIGH_RECORD_TOKENS,
            low_records=sizes.low_records - 1,
        )
        return spare >= HIGH_RECORD_TOKENS and self._fits(form, full)


planner = lru_cache(256)(BlockPlanner)
"""A :class:`BlockPlanner`, the same one for equal arguments."""


def pages_needed(
    geometry: TierGeometry,
    ratio: float,
    recent: int,
    num_tokens: int,
    ladder: tuple[LowFormat, ...] = LADDER,
) -> int:
    """Pages that a request takes until it holds ``num_tokens`` tokens, once it is compressed.

    One more than the ratio allows for: a step may take the next page early.
    """
    blocks = planner(geometry, ratio, recent, ladder)
    if ratio == 1.0 or blocks.compress(num_tokens) is None:
        return blocks.native_pages(num_tokens)
    return blocks.most_pages(num_tokens) + 1


@lru_cache(256)
def most_tokens(
    geometry: TierGeometry,
    ratio: float,
    recent: int,
    pages: int,
    ladder: tuple[LowFormat, ...] = LADDER,
) -> int:
    """Tokens that a request can hold in ``pages`` pages."""
    fits, too_many = 0, int(2 * ratio * pages + 2) * geometry.block_size
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if pages_needed(geometry, ratio, recent, middle, ladder) <= pages:
            fits = middle
        else:
            too_many = middle
    return fits
