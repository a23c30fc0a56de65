"""Compression ratio -> low format -> tier sizes: pure functions of counts.

The scheduler runs them; nothing here looks at a key or a value.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Self

from mikv_vllm.tiers.formats import (
    HIGH_RECORD_TOKENS,
    LADDER,
    LOW_RECORD_TOKENS,
    LowFormat,
    TierGeometry,
)

LEAST_HIGH_FRACTION = 0.02
"""A low format is chosen only if this share of tokens can stay high."""


def high_fraction(geometry: TierGeometry, low_format: LowFormat, ratio: float) -> float:
    """Share of tokens in the high tier at which ``low_format`` stores exactly 1/ratio.

    Above 1.0 or below 0.0 where the format alone is smaller or larger than that.
    """
    low = geometry.low(low_format).num_bytes / LOW_RECORD_TOKENS
    high = geometry.high.num_bytes / HIGH_RECORD_TOKENS
    return (geometry.token_bytes / ratio - low) / (high - low)


@cache
def largest_ratio(
    head_dim: int, high_bits: int = 8, ladder: tuple[LowFormat, ...] = LADDER
) -> float:
    """Return the largest compression ratio of a request, rounded down to a tenth."""
    geometry = TierGeometry(head_dim, 1, high_bits)
    low = geometry.low(ladder[-1]).num_bytes / LOW_RECORD_TOKENS
    high = geometry.high.num_bytes / HIGH_RECORD_TOKENS
    stored = low + LEAST_HIGH_FRACTION * (high - low)
    return math.floor(10 * geometry.token_bytes / stored) / 10


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
    planner = TierPlanner.choose(geometry, ratio, recent, num_tokens, ladder)
    sizes = planner.compress(num_tokens) if ratio > 1.0 else None
    return sizes.pages + 1 if sizes else planner.native_pages(num_tokens)


@lru_cache(256)
def most_tokens(
    geometry: TierGeometry,
    ratio: float,
    recent: int,
    pages: int,
    ladder: tuple[LowFormat, ...] = LADDER,
) -> int:
    """Return the number of tokens of a request that fit into ``pages`` pages."""
    fits, too_many = 0, int(2 * ratio * pages + 2) * geometry.block_size
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if pages_needed(geometry, ratio, recent, middle, ladder) <= pages:
            fits = middle
        else:
            too_many = middle
    return fits


@dataclass(frozen=True)
class TierSizes:
    """Sizes of one compressed request, the same in every layer and head.

    ``low_end_bytes`` is the stream offset behind the last low record, in bytes; the low tier is
    ``low_records`` records below it.
    """

    pages: int
    high_tokens: int
    low_records: int
    low_end_bytes: int

    @property
    def low_tokens(self) -> int:
        return LOW_RECORD_TOKENS * self.low_records

    @property
    def num_tokens(self) -> int:
        return self.high_tokens + self.low_tokens


@dataclass(frozen=True)
class AppendStep:
    """How a new token, or the tokens of the next prompt chunk, join the tiers of a request.

    A new token joins before attention. The tokens of a chunk join after their attention. The least
    important of all high and new tokens are then demoted.
    """

    new_tokens: int
    """Tokens that join: 1 in a decode step."""
    new_pages: int
    moved_records: int
    """Low records at the lowest offsets that move into new pages, to the new ``low_end_bytes``."""
    demoted_records: int
    """Number of demotions: in each, 32 high tokens become one low record."""
    after: TierSizes
    """Sizes afterwards."""


@dataclass(frozen=True)
class TierPlanner:
    """Sizes of a request's tiers from its token count, for one ratio.

    Args:
        geometry: sizes of the model's records and pages.
        ratio: requested compression ratio, above 1.
        recent: newest tokens that are never demoted.
        low_format: of the low tier.
    """

    geometry: TierGeometry
    ratio: float
    recent: int
    low_format: LowFormat

    @classmethod
    def choose(
        cls,
        geometry: TierGeometry,
        ratio: float,
        recent: int,
        num_tokens: int,
        ladder: tuple[LowFormat, ...] = LADDER,
    ) -> Self:
        """The planner of the richest format with which a request of ``num_tokens`` tokens fits.

        That is, the pages of the ratio; if no format does, one page more, and so on.

        Args:
            ladder: low formats, richest first.
        """
        planners = cls._of_ladder(geometry, ratio, recent, ladder)
        first = planners[0]
        for pages in range(first.budget(num_tokens), first.native_pages(num_tokens)):
            for planner in planners:
                if planner._fit(num_tokens, pages):
                    return planner
        return first

    @classmethod
    @lru_cache(256)
    def _of_ladder(
        cls, geometry: TierGeometry, ratio: float, recent: int, ladder: tuple[LowFormat, ...]
    ) -> tuple[Self, ...]:
        """A planner for each format that leaves the high tier its share; the last one's if none."""
        fitting = tuple(
            cls(geometry, ratio, recent, low_format)
            for low_format in ladder
            if high_fraction(geometry, low_format, ratio) >= LEAST_HIGH_FRACTION
        )
        return fitting or (cls(geometry, ratio, recent, ladder[-1]),)

    def least_high(self, num_tokens: int) -> int:
        """High tokens below which no demotion goes: the recent ones and some important ones."""
        return self.recent + int(LEAST_HIGH_FRACTION / 2 * num_tokens)

    @cached_property
    def low_record_bytes(self) -> int:
        """Bytes of a low record."""
        return self.geometry.low(self.low_format).num_bytes

    def budget(self, num_tokens: int) -> int:
        """Pages that bring ``num_tokens`` tokens closest to the ratio."""
        share = self.geometry.block_size * self.ratio
        return max(1, math.floor(num_tokens / share + 0.5))

    def native_pages(self, num_tokens: int) -> int:
        """Pages that ``num_tokens`` uncompressed tokens take."""
        return -(-num_tokens // self.geometry.block_size)

    def _fit(self, num_tokens: int, pages: int) -> TierSizes | None:
        """The sizes with the most high tokens in ``pages``, or None if nothing fits."""
        low_end_bytes = pages * self.geometry.page_bytes
        record = self.low_record_bytes
        high_record = self.geometry.high.num_bytes
        free = low_end_bytes - self.geometry.header_bytes
        # If all tokens are high first, every low record replaces two high records.
        excess = self.geometry.high_bytes(num_tokens) - low_end_bytes
        records = max(0, math.ceil(excess / (2 * high_record - record)))
        high_tokens = num_tokens - LOW_RECORD_TOKENS * records
        least = self.least_high(num_tokens)
        if high_tokens < least:
            return None
        if (
            records
            and (free - records * record) // high_record * HIGH_RECORD_TOKENS
            < LOW_RECORD_TOKENS + least
        ):
            # The next demotion would leave too few.
            return None
        return TierSizes(pages, high_tokens, records, low_end_bytes)

    def compress(self, num_tokens: int) -> TierSizes | None:
        """Sizes of a native request of ``num_tokens`` once compressed; None if no page is saved."""
        pages = self._first_pages(num_tokens)
        while pages < self.native_pages(num_tokens):
            if sizes := self._fit(num_tokens, pages):
                return sizes
            pages += 1
        return None

    def append(self, sizes: TierSizes) -> AppendStep:
        """Plan one decode step of a compressed request."""
        pages, high, low, low_end_bytes = (
            sizes.pages,
            sizes.high_tokens,
            sizes.low_records,
            sizes.low_end_bytes,
        )
        if high % HIGH_RECORD_TOKENS:  # the last high record has space
            return AppendStep(1, 0, 0, 0, TierSizes(pages, high + 1, low, low_end_bytes))
        geometry, record = self.geometry, self.low_record_bytes
        new_pages = moved = demoted = 0

        def full() -> bool:
            return geometry.high_bytes(high + 1) > low_end_bytes - low * record

        if full():
            new_pages = max(0, self.budget(sizes.num_tokens + 1) - pages)
            if not new_pages and high - LOW_RECORD_TOKENS >= self.least_high(sizes.num_tokens):
                high -= LOW_RECORD_TOKENS
                low += 1
                demoted = 1
            new_pages = new_pages or int(full())
            pages += new_pages
            if new_pages:
                moved, low_end_bytes = self._moved(sizes, pages)
        return AppendStep(
            1, new_pages, moved, demoted, TierSizes(pages, high + 1, low, low_end_bytes)
        )

    def extend(self, sizes: TierSizes, count: int) -> AppendStep:
        """Plan a step in which the next ``count`` tokens of a prompt join a compressed request."""
        geometry, record = self.geometry, self.low_record_bytes
        num_tokens = sizes.num_tokens + count
        least = self.least_high(num_tokens)
        pages = max(sizes.pages, self._first_pages(num_tokens))
        while True:
            moved, low_end_bytes = 0, sizes.low_end_bytes
            if pages > sizes.pages:
                moved, low_end_bytes = self._moved(sizes, pages)
            room = low_end_bytes - geometry.header_bytes
            high, low = sizes.high_tokens + count, sizes.low_records
            while high > self._high_room(room - low * record) and high - LOW_RECORD_TOKENS >= least:
                high -= LOW_RECORD_TOKENS
                low += 1
            if high <= self._high_room(room - low * record):
                after = TierSizes(pages, high, low, low_end_bytes)
                return AppendStep(count, pages - sizes.pages, moved, low - sizes.low_records, after)
            pages += 1

    def _first_pages(self, num_tokens: int) -> int:
        """Pages to try first: those of the ratio, or fewer where all tokens can be high."""
        all_high = -(-self.geometry.high_bytes(num_tokens) // self.geometry.page_bytes)
        return min(self.budget(num_tokens), all_high)

    def _high_room(self, num_bytes: int) -> int:
        """High tokens that fit into ``num_bytes``."""
        return num_bytes // self.geometry.high.num_bytes * HIGH_RECORD_TOKENS

    def _moved(self, sizes: TierSizes, pages: int) -> tuple[int, int]:
        """Return how many records move if the stream grows to ``pages``, and the new low end."""
        end, record = pages * self.geometry.page_bytes, self.low_record_bytes
        moved = (end - sizes.low_end_bytes) // record
        if moved >= sizes.low_records:
            return sizes.low_records, end
        return moved, sizes.low_end_bytes + moved * record
