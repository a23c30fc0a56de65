"""Sizes of tiers, and the range of ratios: pure functions of counts."""

import math
from dataclasses import dataclass
from functools import cache

from mikv_vllm.tiers.formats import (
    HIGH_RECORD_TOKENS,
    LADDER,
    LOW_RECORD_TOKENS,
    LowFormat,
    TierGeometry,
)

LEAST_HIGH_FRACTION = 0.02
"""A low format is chosen only if this share of tokens can stay high."""


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


@dataclass(frozen=True)
class TierSizes:
    """Sizes of one block, equal in all layers and heads.

    The low tier is the ``low_records`` records before ``low_end_bytes``, an offset in the stream.
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
