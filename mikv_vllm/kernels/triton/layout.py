"""What the kernels are compiled for: sizes from ``tiers/formats.py``, counted in lines."""

from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

from mikv_vllm.tiers.formats import (
    BAND_CHANNELS,
    LINE_BYTES,
    LowFormat,
    LowLayout,
    TierGeometry,
)
from mikv_vllm.tiers.packing import PLANES

SMALLEST_TILE = 8
"""Least query heads in a tensor core's tile: fewer are padded."""


def next_power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Layout:
    """A model's layer, as one compile-time argument."""

    head_dim: int
    queries_per_kv_head: int
    """Query heads of a KV head."""
    block_size: int
    high_bits: int

    @property
    def geometry(self) -> TierGeometry:
        return TierGeometry(self.head_dim, self.block_size, self.high_bits)

    @property
    def padded(self) -> int:
        """Channels rounded up to a power of two."""
        return next_power_of_two(self.head_dim)

    @property
    def heads(self) -> int:
        """Query heads of a KV head, padded to a tile."""
        return max(SMALLEST_TILE, next_power_of_two(self.queries_per_kv_head))

    @property
    def members(self) -> int:
        """Columns of queries: in two parts they fill a tile, if ``group`` leaves half of it."""
        return max(SMALLEST_TILE // 2, next_power_of_two(self.queries_per_kv_head))

    @property
    def warps(self) -> int:
        """Warps of a decode program: one, if queries and outputs fit its registers."""
        return max(1, self.padded * 2 * self.members * self.high_bits // 8192)

    @property
    def page_lines(self) -> int:
        return self.geometry.page_bytes // LINE_BYTES

    @property
    def header_lines(self) -> int:
        return self.geometry.header_bytes // LINE_BYTES

    @property
    def key_bands(self) -> int:
        """Bands of key channels, neighbours by rank, that share their bits."""
        return self.head_dim // BAND_CHANNELS

    @property
    def high_record_lines(self) -> int:
        """Lines of a high group."""
        return self.geometry.high.num_bytes // LINE_BYTES

    @property
    def high_values(self) -> int:
        """Byte offsets in a high group, from here on."""
        return self.geometry.high.values

    @property
    def high_key_scales(self) -> int:
        return self.geometry.high.key_scales

    @property
    def high_value_scales(self) -> int:
        return self.geometry.high.value_scales

    @property
    def high_scores(self) -> int:
        return self.geometry.high.scores


@dataclass(frozen=True)
class LowLines:
    """A low format of one head size, as one compile-time argument. Offsets in lines."""

    head_dim: int
    low_format: LowFormat

    @property
    def _layout(self) -> LowLayout:
        return LowLayout(self.head_dim, self.low_format)

    @property
    def keys_per_token(self) -> bool:
        return self.low_format.keys_per_token

    @property
    def key_code(self) -> int:
        """Bits of keys, and whether they are balanced, as rows of a batch have them."""
        return self.low_format.key_code

    @property
    def value_bits(self) -> int:
        return self.low_format.value_bits

    @property
    def count(self) -> int:
        """Lines of a chunk."""
        return self._layout.num_bytes // LINE_BYTES

    @property
    def values(self) -> int:
        return self._layout.values // LINE_BYTES

    @property
    def key_scales(self) -> int:
        return self._layout.key_scales // LINE_BYTES

    @property
    def key_slices(self) -> int:
        """Key scales, and as many zero points, a byte each: by channel, by token if balanced."""
        return self._layout.key_zeros - self._layout.key_scales

    @property
    def value_scales(self) -> int:
        return self._layout.value_scales // LINE_BYTES

    @property
    def value_groups(self) -> int:
        return self._layout.value_groups

    @property
    def band_bits(self) -> tuple[int, ...]:
        """Bits of each band of keys; up to a power of two, bands of 0 bits follow."""
        bits = self.low_format.band_bits(self.head_dim)
        return (*bits, *[0] * (next_power_of_two(len(bits)) - len(bits)))

    @property
    def band_lines(self) -> tuple[int, ...]:
        """First line of each band, whose 8 tiles take a line for each bit."""
        return tuple(accumulate(self.band_bits[:-1], initial=0))

    @property
    def band_mains(self) -> tuple[int, ...]:
        """Bits of each band's first plane; a second one holds the rest of 3, 5 and 6 bits."""
        return tuple(PLANES[bits][0] for bits in self.band_bits if bits)

    @property
    def key_gap(self) -> int:
        """Bits between two integers of a word, as keys are unpacked: the most that a plane has."""
        return self.band_mains[0]

    @property
    def band_runs(self) -> tuple[tuple[int, int], ...]:
        """Bands with the same bits: the first, and how many."""
        bands = range(len(self.band_mains))
        runs = [list(run) for _, run in groupby(bands, self.band_bits.__getitem__)]
        return tuple((run[0], len(run)) for run in runs)

    @property
    def value_main(self) -> int:
        """Bits of the values' first plane; a second one holds the rest of 3 and 5 bits."""
        return PLANES[self.value_bits][0]

    @property
    def value_tiles_taken(self) -> int:
        """Tiles of four tokens' values that one thread takes out of a word of the first plane."""
        per_line = 8 // self.value_main
        return per_line if self.head_dim // 16 % per_line == 0 else 1


class Stream(NamedTuple):
    """Where a request's stream of one head lies, for device functions."""

    pages: object
    """int32 pointer to the head's part of page 0."""
    page_stride: object
    """Words from a page to the next."""
    table: object
    """int32 pointer to the request's block table."""
