"""Byte layout of tiered pages.

The tiered pages of one request, in block-table order, form one *stream* of bytes for each layer and
KV head::

    0                                                              low_end_bytes    end of pages
    | header | high record 0 | 1 | ... |  free  | low record 0 | 1 | ... |   free   |

High records grow upwards, low records grow downwards: a new low record becomes record 0. All parts
are multiples of a 64-byte line, and so are pages. A record may cross a page boundary, a line never
does.

The oracle and the Triton kernels take their offsets from here. The C++ kernels repeat them in
``kernels/cpu/layout.hpp``, which ``tests/kernels/test_cpu_layout.py`` compares with this module.
This module does not import torch.
"""

import re
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal, Self

LINE_BYTES = 64
LOW_RECORD_TOKENS = 32
"""Tokens of one low-tier record."""
HIGH_RECORD_TOKENS = 16
"""Tokens of one high-tier record."""
BAND_CHANNELS = 16
"""Key channels of neighbouring rank that are stored with the same bits in the low tier."""
VALUE_GROUP = 64
"""Value channels that share one scale per token in the low tier."""
KEY_ZERO_STEPS = 2
"""A key zero point counts in units of its scale divided by this, with codec ``channel``."""
CHANNEL_MARGIN = 0.125
"""Steps by which the least and the largest key of a channel may lie outside a low record's grid.

With 0, both would be levels of the grid, and its steps would be larger. With 0.5, the squared error
is smaller still, but numbers become smaller on average, and the divergence grows again
(docs/notes/quality-history.md)."""
TOKEN_MARGIN = 0.25
"""The same for a token's numbers that share a scale: values, and keys with codec ``balanced``."""
SCALE_BIAS = 22
"""Exponent bias of an 8-bit scale of the low tier: 5 bits of exponent, 3 of mantissa, no sign."""
HIGH_OFFSET = 128
"""Added to an int8 of the high tier, which is stored as an unsigned byte."""
NATIVE_BYTES = 2
"""Bytes per number of an uncompressed cache (bf16 or fp16)."""
KEYS_PER_TOKEN_BIT = 16
"""Bit of :attr:`LowFormat.key_code` that is set if keys have one scale per token."""


def lines(num_bytes: int) -> int:
    """``num_bytes`` rounded up to whole lines."""
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES


Codec = Literal["channel", "balanced"]


@dataclass(frozen=True)
class KeyScales:
    """What the codec of the keys decides about names and bytes of a low format.

    ``prefix``: first letter of the names. ``widths``: how many numbers of bits the names list, for
    equal parts of the channels. ``per_token``: whether keys have one scale per token, or one per
    channel and record.
    """

    prefix: str
    widths: int
    per_token: bool

    def count(self, head_dim: int) -> int:
        """Number of key scales in a low record; it has as many key zero points."""
        return LOW_RECORD_TOKENS if self.per_token else head_dim


KEY_SCALES: dict[Codec, KeyScales] = {
    "channel": KeyScales("K", 4, per_token=False),
    "balanced": KeyScales("B", 1, per_token=True),
}
"""By codec. How each codec quantizes is in :mod:`mikv_vllm.tiers.key_codecs`."""


@dataclass(frozen=True, order=True)
class LowFormat:
    """Bits of the low tier, and the codec of its keys. Values are quantized per token.

    ``key_bits``: for each quarter of the key channels, ordered by rank, that is, by falling cost of
    rounding a channel (:func:`~mikv_vllm.tiers.key_codecs.key_cost`).
    ``codec``: ``channel`` quantizes keys per channel of a low record. ``balanced`` quantizes them
    per token after the channel balancer of the MiKV paper (arXiv:2402.18096, section 3.3), all
    channels with the same bits.

    Raises:
        ValueError: bits that the tiers cannot store.
    """

    key_bits: tuple[int, int, int, int]
    value_bits: int
    codec: Codec = "channel"

    def __post_init__(self) -> None:
        falling = sorted(self.key_bits, reverse=True) == list(self.key_bits)
        if not (falling and set(self.key_bits) <= {1, 2, 3, 4, 5, 6} and len(self.key_bits) == 4):
            raise ValueError(
                f"low format {self.name}: the key bits of the four quarters must be from 1 to 6,"
                " each at most the one before"
            )
        if len(set(self.key_bits)) > self.key_scales.widths:
            raise ValueError(
                f"low format {self.name}: codec {self.codec} needs equal key bits in all quarters"
            )
        if self.value_bits not in {2, 3, 4, 5}:
            raise ValueError(f"low format {self.name}: the value bits must be from 2 to 5")

    @property
    def key_scales(self) -> KeyScales:
        """What the codec decides about names and bytes."""
        return KEY_SCALES[self.codec]

    @property
    def keys_per_token(self) -> bool:
        """Whether keys have one scale per token."""
        return self.key_scales.per_token

    @property
    def name(self) -> str:
        """Prefix and bits: ``K6433V3`` or ``B4V3``.

        ``K6433V3`` (codec ``channel``) has 6, 4, 3 and 3 bits for the quarters of a key, and 3 bits
        for a value. ``B4V3`` (codec ``balanced``) has 4 bits for a key and 3 bits for a value.
        """
        scales = self.key_scales
        widths = "".join(str(bits) for bits in self.key_bits[: scales.widths])
        return f"{scales.prefix}{widths}V{self.value_bits}"

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the format with this :attr:`name`.

        Raises:
            ValueError: the name is not valid.
        """
        for codec, scales in KEY_SCALES.items():
            found = re.fullmatch(rf"{scales.prefix}(\d{{{scales.widths}}})V(\d)", name)
            if found:
                key_bits = tuple(int(bits) for bits in found[1] for _ in range(4 // scales.widths))
                return cls(key_bits, int(found[2]), codec)  # type: ignore[arg-type]
        raise ValueError(f"{name!r} is not a low format; valid names look like K6433V3 or B4V3")

    @property
    def key_code(self) -> int:
        """The key bits as one integer, for kernels.

        Bits 0 to 15: ``key_bits``, 4 bits each, the first quarter lowest.
        Bit :data:`KEYS_PER_TOKEN_BIT`: :attr:`keys_per_token`.
        """
        bits = sum(bits << 4 * i for i, bits in enumerate(self.key_bits))
        return bits | self.keys_per_token << KEYS_PER_TOKEN_BIT

    @property
    def token_bits(self) -> float:
        """Bits of one key number plus bits of one value number, mean over channels."""
        return sum(self.key_bits) / 4 + self.value_bits

    def band_bits(self, head_dim: int) -> list[int]:
        """Bits of each band of :data:`BAND_CHANNELS` channels."""
        bands = head_dim // BAND_CHANNELS
        return [self.key_bits[4 * band // bands] for band in range(bands)]

    def channel_bits(self, head_dim: int) -> list[int]:
        """Bits of each channel, by rank."""
        return [bits for bits in self.band_bits(head_dim) for _ in range(BAND_CHANNELS)]


LADDER = tuple(
    LowFormat.parse(name)
    for name in (
        *("K6655V5", "K6544V5", "K6544V4", "K6433V4", "K6433V3"),
        *("K5332V3", "K4322V3", "K4322V2", "K4221V2", "K3211V2"),
    )
)
"""Low formats that a ratio can choose, richest first, as `mikv-eval calibrate` chose them for the
embedded model (docs/quality.md)."""

LADDERS: dict[Codec, tuple[LowFormat, ...]] = {
    "channel": LADDER,
    "balanced": tuple(LowFormat.parse(f"B{bits}V{bits}") for bits in (5, 4, 3, 2)),
}
"""Low formats that a ratio can choose, by codec."""


@dataclass(frozen=True)
class LowLayout:
    """Byte offsets in a low record: 32 tokens of one KV head.

    ``keys``: for each band of 16 channels in rank order, for each bit plane, tiles of 4 channels x
    16 tokens (:func:`~mikv_vllm.tiers.packing.key_tiles`).
    ``values``: for each bit plane, tiles of 4 tokens x 16 channels.
    ``key_scales``, ``key_zeros``: uint8 and int8, one per channel in rank order, or one per token
    (:meth:`KeyScales.count`).
    ``value_scales``, ``value_zeros``: uint8 and int8 ``[value_groups, 32]``.

    Example: ``K6433V3`` and a head size of 64. Keys take 64 x 32 x 4 bits = 1024 bytes, values
    64 x 32 x 3 bits = 768 bytes, key scales and zero points 64 bytes each, value scales and zero
    points 32 bytes each: 1984 bytes for 32 tokens.
    """

    head_dim: int
    low_format: LowFormat

    @property
    def value_groups(self) -> int:
        """Number of value groups."""
        return max(1, self.head_dim // VALUE_GROUP)

    @property
    def keys(self) -> int:
        return 0

    @cached_property
    def values(self) -> int:
        return LOW_RECORD_TOKENS * sum(self.low_format.channel_bits(self.head_dim)) // 8

    @cached_property
    def key_scales(self) -> int:
        return self.values + LOW_RECORD_TOKENS * self.head_dim * self.low_format.value_bits // 8

    @cached_property
    def key_zeros(self) -> int:
        return self.key_scales + self.low_format.key_scales.count(self.head_dim)

    @cached_property
    def value_scales(self) -> int:
        return self.key_scales + lines(2 * (self.key_zeros - self.key_scales))

    @cached_property
    def value_zeros(self) -> int:
        return self.value_scales + LOW_RECORD_TOKENS * self.value_groups

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the whole record."""
        return lines(self.value_zeros + LOW_RECORD_TOKENS * self.value_groups)


_low_layout = cache(LowLayout)  # its offsets are computed once


@dataclass(frozen=True)
class HighLayout:
    """Byte offsets in a high record: 16 tokens of one KV head.

    With 8 bits, keys and values are ``int8 + 128`` in tiles as in the low tier, with one fp16 scale
    per token for the key and one for the value. With 16 bits, keys and values are
    ``[16, head_dim]`` in the dtype of the cache, without scales. Importance scores are float32
    ``[16]``.
    """

    head_dim: int
    bits: int

    @property
    def keys(self) -> int:
        return 0

    @cached_property
    def values(self) -> int:
        return HIGH_RECORD_TOKENS * self.head_dim * self.bits // 8

    @cached_property
    def key_scales(self) -> int:
        return 2 * self.values

    @cached_property
    def value_scales(self) -> int:
        return self.key_scales + (2 * HIGH_RECORD_TOKENS if self.bits == 8 else 0)

    @cached_property
    def scores(self) -> int:
        return self.value_scales + (2 * HIGH_RECORD_TOKENS if self.bits == 8 else 0)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the whole record."""
        return self.scores + 4 * HIGH_RECORD_TOKENS


@dataclass(frozen=True)
class HeaderLayout:
    """Byte offsets in the header of a stream. All arrays are ``[head_dim]``, by rank.

    ``centers``, ``units``: fp16, of the key channels. ``order``: uint8, the channel at each rank.
    See :class:`~mikv_vllm.tiers.key_codecs.KeyFrame`.
    """

    head_dim: int

    @property
    def centers(self) -> int:
        return 0

    @cached_property
    def units(self) -> int:
        return 2 * self.head_dim

    @cached_property
    def order(self) -> int:
        return self.units + 2 * self.head_dim

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the whole header."""
        return lines(self.order + self.head_dim)


@dataclass(frozen=True)
class TierGeometry:
    """Sizes of the tiers of one model, per layer and KV head.

    ``block_size``: tokens of a native page. ``high_bits``: 8 or 16, per number of the high tier.
    """

    head_dim: int
    block_size: int
    high_bits: int = 8

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of a page per layer and KV head."""
        return self.block_size * self.token_bytes

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of an uncompressed token per layer and KV head."""
        return 2 * self.head_dim * NATIVE_BYTES

    @cached_property
    def header(self) -> HeaderLayout:
        return HeaderLayout(self.head_dim)

    @property
    def header_bytes(self) -> int:
        return self.header.num_bytes

    @cached_property
    def high(self) -> HighLayout:
        return HighLayout(self.head_dim, self.high_bits)

    def low(self, low_format: LowFormat) -> LowLayout:
        return _low_layout(self.head_dim, low_format)

    def high_bytes(self, num_tokens: int) -> int:
        """Bytes of the header and the high tier with ``num_tokens`` tokens."""
        records = -(-num_tokens // HIGH_RECORD_TOKENS)
        return self.header_bytes + records * self.high.num_bytes
