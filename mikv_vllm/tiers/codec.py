"""The codecs in plain torch: what every kernel is tested against.

Low tier, codec ``channel``: keys asymmetric per channel over a chunk of 32 tokens, values
asymmetric per token in groups of channels, after a Hadamard rotation of the channels. A scale is
an 8-bit float (:func:`encode_scale`). A zero point is an int8 in units of its scale, counted from
the channel's centre for keys and from 0 for values.
High tier, 8 bits: symmetric per token, one fp16 scale each for key and value.
"""

from dataclasses import dataclass
from functools import cache

import torch

from mikv_vllm.tiers.formats import CHUNK_TOKENS, LowFormat, LowLayout

SCALE_BIAS = 22
"""Exponent bias of the 8-bit scale: 5 bits of exponent, 3 of mantissa, no sign."""
HIGH_OFFSET = 128
"""Added to a high-tier integer so that it is stored as an unsigned byte."""


def hadamard_size(head_dim: int) -> int:
    """Size of the rotation's blocks: the largest power of two that divides ``head_dim``."""
    return head_dim & -head_dim


@cache
def _hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / size**0.5


def rotate(values: torch.Tensor) -> torch.Tensor:
    """Rotate the last axis by an orthonormal block Hadamard; its own inverse. float32."""
    head_dim = values.shape[-1]
    size = hadamard_size(head_dim)
    blocks = values.float().reshape(*values.shape[:-1], head_dim // size, size)
    return (blocks @ _hadamard(size)).reshape(values.shape)


def encode_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round positive float32 scales **up** to 8-bit floats, uint8.

    A code ``e * 8 + m`` stands for ``(1 + m / 8) * 2**(e - 22)``: 2.4e-7 to 960, in steps of at
    most 12.5 %.
    """
    bits = scale.float().contiguous().view(torch.int32)
    # Adding all lower mantissa bits carries into the third one unless they are zero.
    code = ((bits + (1 << 20) - 1) >> 20) - ((127 - SCALE_BIAS) << 3)
    return code.clamp(0, 255).to(torch.uint8)


def decode_scale(code: torch.Tensor) -> torch.Tensor:
    """Undo :func:`encode_scale`, float32."""
    bits = (code.to(torch.int32) + ((127 - SCALE_BIAS) << 3)) << 20
    return bits.view(torch.float32)


@dataclass(frozen=True)
class Quantized:
    """Integers with their metadata: ``x ~ center + scale * (integers + zeros)``.

    ``integers`` has the shape of ``x``, ``scales`` (uint8 codes) and ``zeros`` (int8) have the
    reduced axis kept at size 1.
    """

    integers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """The numbers that the integers stand for, without the centre, float32."""
        return decode_scale(self.scales) * (self.integers.float() + self.zeros.float())


def quantize(x: torch.Tensor, bits: int, dim: int) -> Quantized:
    """Quantize float32 ``x`` asymmetrically to ``bits``, with one scale per slice along ``dim``."""
    top = (1 << bits) - 1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    # The second term keeps the zero point within an int8 where a slice lies far from its centre.
    scale = torch.maximum((high - low) / top, low.abs() / 127)
    scales = encode_scale(scale)
    scale = decode_scale(scales)
    zeros = (low / scale).round().clamp(-128, 127)
    integers = ((x / scale).round() - zeros).clamp(0, top)
    return Quantized(integers.to(torch.uint8), scales, zeros.to(torch.int8))


def quantize_keys(keys: torch.Tensor, center: torch.Tensor, bits: int) -> Quantized:
    """Quantize one chunk of keys ``[..., 32, head_dim]`` per channel around ``center``."""
    return quantize(keys.float() - center.float(), bits, dim=-2)


def quantize_values(values: torch.Tensor, bits: int) -> Quantized:
    """Rotate values ``[..., 32, head_dim]`` and quantize them per token and group of channels.

    Returns integers ``[..., groups, 32, head_dim / groups]``.
    """
    layout = LowLayout(values.shape[-1], LowFormat(4, bits))
    groups = layout.value_groups
    split = rotate(values).reshape(*values.shape[:-1], groups, values.shape[-1] // groups)
    return quantize(split.movedim(-2, -3), bits, dim=-1)


def merge_value_groups(grouped: torch.Tensor) -> torch.Tensor:
    """``[..., groups, tokens, channels]`` -> ``[..., tokens, head_dim]``."""
    merged = grouped.movedim(-3, -2)
    return merged.reshape(*merged.shape[:-2], -1)


def quantize_high(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize ``[..., tokens, head_dim]`` symmetrically per token to 8 bits.

    Returns ``int8 + 128`` as uint8 of the same shape, and fp16 scales ``[..., tokens]``.
    """
    scale = (x.float().abs().amax(-1) / 127).clamp(min=6.2e-5).to(torch.float16)
    integers = (x.float() / scale.float()[..., None]).round().clamp(-127, 127)
    return (integers + HIGH_OFFSET).to(torch.uint8), scale


def dequantize_high(integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Undo :func:`quantize_high`, float32."""
    return (integers.float() - HIGH_OFFSET) * scale.float()[..., None]


def roundtrip_low(
    keys: torch.Tensor, values: torch.Tensor, center: torch.Tensor, low_format: LowFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[..., n * 32, head_dim]`` as the low tier gives them back, float32."""
    *lead, tokens, head_dim = keys.shape
    chunked = (*lead, tokens // CHUNK_TOKENS, CHUNK_TOKENS, head_dim)
    middle = center.float()[..., None, None, :]
    new_keys = (
        quantize_keys(keys.reshape(chunked), middle, low_format.key_bits).dequantize() + middle
    )
    new_values = quantize_values(values.reshape(chunked), low_format.value_bits).dequantize()
    return new_keys.reshape(keys.shape), rotate(merge_value_groups(new_values)).reshape(keys.shape)
