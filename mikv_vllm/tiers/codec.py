"""Quantization in plain torch, except for the keys of the low tier: the oracle for the kernels.

Values of the low tier are rotated by a Hadamard matrix and quantized asymmetrically, with one scale
per token and value group. A scale is an 8-bit float (:func:`encode_scale`); the zero point is an
int8 in units of the scale. Keys of the low tier are in :mod:`mikv_vllm.tiers.key_codecs`.

The 8-bit high tier is quantized symmetrically per token, with one fp16 scale for the key and one
for the value.
"""

from dataclasses import dataclass
from functools import cache

import torch

from mikv_vllm.tiers.formats import HIGH_OFFSET, SCALE_BIAS, TOKEN_MARGIN, VALUE_GROUP


def hadamard_size(head_dim: int) -> int:
    """Block size of the rotation: the largest power of two that divides ``head_dim``."""
    return head_dim & -head_dim


@cache
def _hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / size**0.5


def rotate(values: torch.Tensor) -> torch.Tensor:
    """Rotate the last axis by an orthonormal block Hadamard matrix, which is its own inverse.

    Returns float32 of the same shape.
    """
    head_dim = values.shape[-1]
    size = hadamard_size(head_dim)
    blocks = values.float().reshape(*values.shape[:-1], head_dim // size, size)
    return (blocks @ _hadamard(size)).reshape(values.shape)


def encode_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round positive float32 scales **up** to 8-bit floats, uint8.

    The code ``e * 8 + m`` stands for ``(1 + m / 8) * 2**(e - SCALE_BIAS)``: from 2.4e-7 to 960, in
    steps of at most 12.5 %. Scales out of range get the nearest code.
    """
    bits = scale.float().contiguous().view(torch.int32)
    # The sum carries into the third mantissa bit unless all lower bits are zero.
    code = ((bits + (1 << 20) - 1) >> 20) - ((127 - SCALE_BIAS) << 3)
    return code.clamp(0, 255).to(torch.uint8)


def decode_scale(code: torch.Tensor) -> torch.Tensor:
    """Undo :func:`encode_scale`, float32."""
    bits = (code.to(torch.int32) + ((127 - SCALE_BIAS) << 3)) << 20
    return bits.view(torch.float32)


@dataclass(frozen=True)
class Quantized:
    """Integers with their metadata: ``x ~ steps * (integers + zeros / zero_steps)``.

    ``integers``: uint8. ``scales``: uint8, as stored. ``steps``: float32, the scales decoded.
    ``zeros``: int8. The axis that shares a scale has size 1 in all but ``integers``.
    """

    integers: torch.Tensor
    scales: torch.Tensor
    steps: torch.Tensor
    zeros: torch.Tensor
    zero_steps: int = 1

    def dequantize(self) -> torch.Tensor:
        """Return the numbers that the integers stand for, float32."""
        return self.steps * (self.integers.float() + self.zeros.float() / self.zero_steps)


def grid_start(
    low: torch.Tensor, high: torch.Tensor, steps: torch.Tensor, top: float | torch.Tensor
) -> torch.Tensor:
    """Return the number that integer 0 stands for, in steps, if the grid is centred in a range."""
    return (low + high) * 0.5 / steps - top / 2


def quantize_values(values: torch.Tensor, bits: int) -> Quantized:
    """Rotate values ``[..., 32, head_dim]`` and quantize them per token and value group.

    Returns integers ``[..., value_groups, 32, head_dim / value_groups]``.
    """
    value_groups = max(1, values.shape[-1] // VALUE_GROUP)
    channels = values.shape[-1] // value_groups
    split = rotate(values).reshape(*values.shape[:-1], value_groups, channels)
    return quantize_per_token(split.movedim(-2, -3), bits)


def quantize_per_token(x: torch.Tensor, bits: int) -> Quantized:
    """Quantize ``[..., channels]`` asymmetrically, with one 8-bit scale for the last axis."""
    top = (1 << bits) - 1
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    # The second term keeps the zero point in the range of int8.
    scales = encode_scale(torch.maximum((high - low) / (top + 2 * TOKEN_MARGIN), low.abs() / 127))
    steps = decode_scale(scales)
    zeros = grid_start(low, high, steps, top).round().clamp(-128, 127)
    integers = ((x / steps).round() - zeros).clamp(0, top)
    return Quantized(integers.to(torch.uint8), scales, steps, zeros.to(torch.int8))


def merge_value_groups(grouped: torch.Tensor) -> torch.Tensor:
    """Join ``[..., value_groups, tokens, channels]`` to ``[..., tokens, head_dim]``."""
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
