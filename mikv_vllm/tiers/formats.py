"""Byte layouts of the tiers: the one definition that oracle and kernels share.

The pages of one compressed request form, for each layer and KV head, one *stream* of bytes (see
:class:`TierGeometry`). Records in it are multiples of a 64-byte line, and so are pages: a record
may cross from one page into the next, a line never does.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

LINE_BYTES = 64
LOW_RECORD_TOKENS = 32
"""Tokens of one low-tier record."""
HIGH_RECORD_TOKENS = 16
"""Tokens of one high-tier record."""
BAND_CHANNELS = 16
"""Key channels, neighbours by rank, that share their bits in the low tier."""
VALUE_GROUP = 64
"""Channels that share a token's value scale in the low tier."""
KEY_ZERO_STEPS = 2
"""A key's zero point is stored in units of its scale divided by this."""
NATIVE_BYTES = 2
"""Bytes per number of an uncompressed cache (bf16 or fp16)."""


def lines(num_bytes: int) -> int:
    """``num_bytes`` rounded up to whole lines."""
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES


Codec = Literal["channel", "balanced"]


@dataclass(frozen=True, order=True)
class LowFormat:
    """Bits of the low tier, and how keys are quantized; values are per token.

    ``key_bits``: of each quarter of a head's channels, those first whose errors cost attention most
    (:func:`~mikv_vllm.tiers.codec.key_frame`).
    ``codec``: ``channel``, keys per channel over a chunk; or ``balanced``, the paper's: keys per
    token, after its channel balancer (arXiv:2402.18096, section 3.3), all channels alike.
    """

    key_bits: tuple[int, int, int, int]
    value_bits: int
    codec: Codec = "channel"

    def __post_init__(self) -> None:
        falling = sorted(self.key_bits, reverse=True) == list(self.key_bits)
        if not (falling and set(self.key_bits) <= {2, 3, 4, 5, 6} and len(self.key_bits) == 4):
            raise ValueError(f"{self.name}: keys take 2 to 6 bits in each quarter, falling")
        if self.keys_per_token and len(set(self.key_bits)) > 1:
            raise ValueError(f"{self.name}: balanced keys have all channels alike")
        if self.value_bits not in {2, 3, 4, 5}:
            raise ValueError(f"{self.name}: values take 2 to 5 bits")

    @property
    def name(self) -> str:
        """All bits: ``K6433V3`` has 6, 4, 3, 3 for the quarters of a key, and 3 for a value.

        ``B4V3`` is balanced, with 4 for a key and 3 for a value.
        """
        if self.keys_per_token:
            return f"B{self.key_bits[0]}V{self.value_bits}"
        return f"K{''.join(map(str, self.key_bits))}V{self.value_bits}"

    @property
    def keys_per_token(self) -> bool:
        return self.codec == "balanced"

    @classmethod
    def parse(cls, name: str) -> Self:
        """The format of a :attr:`name`.

        Raises:
            ValueError: it is no name of a format.
        """
        if found := re.fullmatch(r"B(\d)V(\d)", name):
            bits = int(found[1])
            return cls((bits, bits, bits, bits), int(found[2]), "balanced")
        if not (found := re.fullmatch(r"K(\d{4})V(\d)", name)):
            raise ValueError(f"{name!r} is no low format such as K6433V3 or B4V3")
        return cls(tuple(map(int, found[1])), int(found[2]))  # type: ignore[arg-type]

    @property
    def key_code(self) -> int:
        """``key_bits`` as one number for kernels, 4 bits each, the first in the lowest.

        Bit 16 is set if they are balanced.
        """
        return (
            sum(bits << 4 * i for i, bits in enumerate(self.key_bits)) | self.keys_per_token << 16
        )

    @property
    def token_bits(self) -> float:
        """Bits of a key's number and a value's, mean over channels."""
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
        *("K5332V3", "K4322V3", "K4322V2", "K3222V2"),
    )
)
"""The low formats that a ratio can choose, richest first: what `mikv-eval calibrate` found on the
embedded model (docs/quality.md)."""


LADDERS: dict[Codec, tuple[LowFormat, ...]] = {
    "channel": LADDER,
    "balanced": tuple(LowFormat.parse(f"B{bits}V{bits}") for bits in (5, 4, 3, 2)),
}
"""The same by codec."""


@dataclass(frozen=True)
class LowLayout:
    """Byte offsets in a low-tier record of one head: 32 tokens.

    ``keys``: by band of 16 channels in rank order, per bit plane, tiles of 4 channels x 16 tokens
    (:func:`~mikv_vllm.tiers.packing.key_tiles`);
    ``values``: per bit plane, tiles of 4 tokens x 16 channels;
    ``key_scales``, ``key_zeros``: one byte per channel, in rank order; per token if balanced;
    ``value_scales``, ``value_zeros``: one byte per token, for each group of channels
    ``[value_groups, 32]``.
    """

    head_dim: int
    low_format: LowFormat

    @property
    def value_groups(self) -> int:
        """Groups of channels with a value scale each."""
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
        return self.key_scales + (
            LOW_RECORD_TOKENS if self.low_format.keys_per_token else self.head_dim
        )

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


@dataclass(frozen=True)
class HighLayout:
    """Byte offsets in a high-tier record of one head: 16 tokens.

    8 bits: keys and values as ``int8 + 128`` in tiles as in the low tier, one fp16 scale a token
    each. 16 bits: keys, then values, ``[16, head_dim]`` in the cache's dtype, and no scales.
    Scores are float32.
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
class TierGeometry:
    """Sizes of one model's tiers, per layer and KV head.

    A compressed request's pages, in block-table order, are one stream per layer and head. It
    starts with the ``header``, all by rank of the key channels: their centres and the units of
    their scales (or of balanced keys themselves), fp16, and which channels they are, uint8. High
    groups follow it upwards; low chunks lie at the other end and grow downwards. Free space is the
    gap between them.
    """

    head_dim: int
    block_size: int
    high_bits: int = 8

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of a page per layer and KV head."""
        return self.block_size * 2 * self.head_dim * NATIVE_BYTES

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of an uncompressed token per layer and KV head."""
        return 2 * self.head_dim * NATIVE_BYTES

    @cached_property
    def header_bytes(self) -> int:
        return lines(5 * self.head_dim)

    @cached_property
    def high(self) -> HighLayout:
        return HighLayout(self.head_dim, self.high_bits)

    def low(self, low_format: LowFormat) -> LowLayout:
        return LowLayout(self.head_dim, low_format)

    def high_bytes(self, num_tokens: int) -> int:
        """Bytes of the header and the high tier with ``num_tokens`` tokens."""
        groups = -(-num_tokens // HIGH_RECORD_TOKENS)
        return self.header_bytes + groups * self.high.num_bytes
