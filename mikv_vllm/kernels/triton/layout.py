"""Compile-time arguments of the kernels: sizes and offsets of ``tiers/formats.py``, in lines."""

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
"""Least number of query heads in the tile of a tensor core. Fewer heads are padded."""


def next_power_of_two(n: int) -> int:
    """Return the least power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Layout:
    """An attention layer. One compile-time argument."""

    head_dim: int
    queries_per_kv_head: int
    block_size: int
    high_bits: int

    @property
    def geometry(self) -> TierGeometry:
        return TierGeometry(self.head_dim, self.block_size, self.high_bits)

    @property
    def padded(self) -> int:
        """Number of channels, rounded up to a power of two."""
        return next_power_of_two(self.head_dim)

    @property
    def heads(self) -> int:
        """Query heads per KV head, padded to a tile."""
        return max(SMALLEST_TILE, next_power_of_two(self.queries_per_kv_head))

    @property
    def members(self) -> int:
        """Query heads per KV head, padded to half a tile: the two parts of queries fill a tile."""
        return max(SMALLEST_TILE // 2, next_power_of_two(self.queries_per_kv_head))

    @property
    def warps(self) -> int:
        """Warps of a decode program: one, unless queries and outputs do not fit its registers."""
        return max(1, self.padded * 2 * self.members * self.high_bits // 8192)

    @property
    def write_options(self) -> dict[str, int]:
        """Launch options of the kernel that writes the low records of a prompt, without spills.

        Up to 128 channels, three programs fit on a multiprocessor; with 256, one does.
        """
        if self.padded <= 128:
            return {"num_warps": 4, "maxnreg": 168}
        return {"num_warps": 8, "maxnreg": 255}

    @property
    def page_lines(self) -> int:
        return self.geometry.page_bytes // LINE_BYTES

    @property
    def header_lines(self) -> int:
        return self.geometry.header_bytes // LINE_BYTES

    @property
    def header_centers(self) -> int:
        """Offset of the centres in the header, in fp16 numbers."""
        return self.geometry.header.centers // 2

    @property
    def header_units(self) -> int:
        """Offset of the units in the header, in fp16 numbers."""
        return self.geometry.header.units // 2

    @property
    def header_order(self) -> int:
        """Offset of the channels in the header, in bytes."""
        return self.geometry.header.order

    @property
    def key_bands(self) -> int:
        """Number of bands of key channels."""
        return self.head_dim // BAND_CHANNELS

    @property
    def high_record_lines(self) -> int:
        """Lines of a high record."""
        return self.geometry.high.num_bytes // LINE_BYTES

    @property
    def high_values(self) -> int:
        """Byte offset in a high record, as the next three."""
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
    """A low format and a head size. One compile-time argument. Offsets and sizes are in lines."""

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
        """As in the rows of a batch."""
        return self.low_format.key_code

    @property
    def value_bits(self) -> int:
        return self.low_format.value_bits

    @property
    def count(self) -> int:
        """Lines of a low record."""
        return self._layout.num_bytes // LINE_BYTES

    @property
    def values(self) -> int:
        return self._layout.values // LINE_BYTES

    @property
    def key_scales(self) -> int:
        return self._layout.key_scales // LINE_BYTES

    @property
    def key_slices(self) -> int:
        """Number of key scales (:meth:`~mikv_vllm.tiers.formats.KeyScales.count`), a byte each.

        As many zero points follow them.
        """
        return self._layout.key_zeros - self._layout.key_scales

    @property
    def value_scales(self) -> int:
        return self._layout.value_scales // LINE_BYTES

    @property
    def value_groups(self) -> int:
        return self._layout.value_groups

    @property
    def band_bits(self) -> tuple[int, ...]:
        """Bits of each band of keys, padded with 0 up to a power of two."""
        bits = self.low_format.band_bits(self.head_dim)
        return (*bits, *[0] * (next_power_of_two(len(bits)) - len(bits)))

    @property
    def band_lines(self) -> tuple[int, ...]:
        """First line of each band. The 8 tiles of a band take one line per bit."""
        return tuple(accumulate(self.band_bits[:-1], initial=0))

    @property
    def band_mains(self) -> tuple[int, ...]:
        """Bits in the first plane of each band. A second plane has the rest of 3, 5 or 6 bits."""
        return tuple(PLANES[bits][0] for bits in self.band_bits if bits)

    @property
    def key_gap(self) -> int:
        """Bits from an integer to the next in an unpacked word: the most that a plane has."""
        return self.band_mains[0]

    @property
    def band_runs(self) -> tuple[tuple[int, int], ...]:
        """Runs of bands with equal bits: the first band and the number of bands of each run."""
        bands = range(len(self.band_mains))
        runs = [list(run) for _, run in groupby(bands, self.band_bits.__getitem__)]
        return tuple((run[0], len(run)) for run in runs)

    @property
    def value_main(self) -> int:
        """Bits in the first plane of the values. A second plane has the rest of 3 or 5 bits."""
        return PLANES[self.value_bits][0]

    @property
    def value_tiles_taken(self) -> int:
        """Number of value tiles that one thread unpacks from a word of the first plane."""
        per_line = 8 // self.value_main
        return per_line if self.head_dim // 16 % per_line == 0 else 1


@dataclass(frozen=True)
class LowFormats:
    """The low formats that the rows of a batch can have. One compile-time argument."""

    head_dim: int
    low_formats: tuple[LowFormat, ...]

    @property
    def lines(self) -> tuple[LowLines, ...]:
        """The sizes and offsets of each format."""
        return tuple(LowLines(self.head_dim, low_format) for low_format in self.low_formats)


class Stream(NamedTuple):
    """The stream of a request in one KV head, for device functions."""

    pages: object
    """int32 pointer to the part of page 0 that belongs to the head."""
    page_stride: object
    """Words from one page to the next."""
    table: object
    """int32 pointer to the block table of the request."""
