"""The codecs in plain torch: what every kernel is tested against.

Low tier, codec ``channel``: keys asymmetric per channel over a chunk of 32 tokens, values
asymmetric per token in groups of channels, after a Hadamard rotation of the channels.
Key channels are ranked, per request and head, by what their rounding would cost the logits of the
prompt's last queries, and the costly ones get more bits (:func:`key_frame`).
A key's scale is a multiple, 1 to 255, of its channel's unit, and its zero point an int8 in halves
of the scale, counted from the channel's centre. Both ends of a chunk's range are met within a few
per cent of a step so: the keys at the ends are the ones that attention tells apart. Rank, centre
and unit are kept once per request and head.
Codec ``balanced`` is the paper's: keys asymmetric per token, each channel divided by its unit
first, which is the inverse of the paper's balancer (:func:`balancing_unit`).
A scale per token is an 8-bit float (:func:`encode_scale`), its zero point an int8 in whole scales.
High tier, 8 bits: symmetric per token, one fp16 scale each for key and value.
"""

from dataclasses import dataclass
from functools import cache

import torch

from mikv_vllm.tiers.formats import KEY_ZERO_STEPS, LOW_RECORD_TOKENS, VALUE_GROUP, LowFormat

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
    """Integers with their metadata: ``x ~ steps * (integers + zeros / zero_steps)``.

    ``integers`` (uint8) and ``zeros`` (int8) as stored; ``scales`` the stored bytes and ``steps``
    what they stand for, float32. All but ``integers`` keep the reduced axis at size 1.
    """

    integers: torch.Tensor
    scales: torch.Tensor
    steps: torch.Tensor
    zeros: torch.Tensor
    zero_steps: int = 1

    def dequantize(self) -> torch.Tensor:
        """The numbers that the integers stand for, without the centre, float32."""
        return self.steps * (self.integers.float() + self.zeros.float() / self.zero_steps)


@dataclass(frozen=True)
class KeyFrame:
    """What a request's keys are measured against in one head, by rank: ``[head_dim]`` each.

    ``order``: int64, the channel of each rank. ``center``, ``unit``: fp16.
    """

    order: torch.Tensor
    center: torch.Tensor
    unit: torch.Tensor

    def rank(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys ``[..., head_dim]`` by rank, less their centres, float32."""
        return keys[..., self.order].float() - self.center.float()

    def restore(self, ranked: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`rank`."""
        keys = torch.empty_like(ranked)
        keys[..., self.order] = ranked + self.center.float()
        return keys


def key_cost(queries: torch.Tensor, low_keys: torch.Tensor) -> torch.Tensor:
    """What rounding each channel to a given number of bits costs, up to a factor.

    The logits' squared error grows with the square of the query, and that of the key's step, which
    is a chunk's range.

    Args:
        queries: ``[n, head_dim]``.
        low_keys: ``[m, head_dim]``, a multiple of 32 tokens.

    Returns:
        float32 ``[head_dim]``.
    """
    chunks = low_keys.float().unflatten(0, (-1, LOW_RECORD_TOKENS))
    ranges = (chunks.amax(1) - chunks.amin(1)).double().square().sum(0)
    return (queries.double().square().sum(0) * ranges).float()


def key_frame(
    keys: torch.Tensor, low_keys: torch.Tensor, queries: torch.Tensor, low_format: LowFormat
) -> KeyFrame:
    """Rank, centre and unit of a head's channels; if balanced, only units.

    Bits by rank are reverse water-filling in steps (Cover and Thomas, Elements of Information
    Theory, 10.3.3): what a channel costs at equal bits differs by orders of magnitude.

    Args:
        keys: ``[tokens, head_dim]``, all of the request; their mean is the centre.
        low_keys: ``[m, head_dim]``, those that become low. The unit lets a scale cover twice the
            farthest of them from the centre. If there are none, channels keep their order, and
            all keys take the place of the low ones.
        queries: ``[n, head_dim]``, the prompt's last ones, of all query heads of the KV head.
    """
    if low_format.keys_per_token:
        unit = balancing_unit(keys, queries).to(torch.float16)
        return KeyFrame(torch.arange(len(unit)), torch.zeros_like(unit), unit)
    cost = key_cost(queries, low_keys) if len(low_keys) else torch.zeros(keys.shape[1])
    order = cost.argsort(descending=True, stable=True)
    center = keys.float().mean(0).clamp(-65504, 65504).to(torch.float16)
    far = ((low_keys if len(low_keys) else keys).float() - center.float()).abs().amax(0)
    unit = far[order] * (2 / (255 * _tops(low_format, keys.shape[1])))
    return KeyFrame(order, center[order], unit.clamp(6e-8, 65504).to(torch.float16))


def balancing_unit(keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """What balanced keys are divided by, and queries multiplied with: float32 ``[head_dim]``.

    The root of the largest key by the largest query of each channel, without signs.
    """
    largest_key = keys.float().abs().amax(0)
    largest_query = queries.float().abs().amax(0).clamp(min=1e-6)
    return (largest_key / largest_query).sqrt().clamp(1e-3, 65504)


def _tops(low_format: LowFormat, head_dim: int) -> torch.Tensor:
    """Largest integer of each key channel by rank, float32 ``[head_dim]``."""
    return torch.tensor([(1 << bits) - 1.0 for bits in low_format.channel_bits(head_dim)])


def quantize_keys(keys: torch.Tensor, frame: KeyFrame, low_format: LowFormat) -> Quantized:
    """Quantize chunks of one head's keys ``[..., 32, head_dim]`` per channel; ranked.

    Balanced ones per token, in units of their channels.
    """
    if low_format.keys_per_token:
        return _per_token(frame.rank(keys) / frame.unit.float(), low_format.key_bits[0])
    x, unit = frame.rank(keys), frame.unit.float()
    top = _tops(low_format, keys.shape[-1])
    low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    # The second term keeps the zero point within an int8 where a chunk lies far from the centre.
    scale = torch.maximum((high - low) / top, low.abs() * (KEY_ZERO_STEPS / 127))
    scales = (scale / unit).ceil().clamp(1, 255)
    steps = scales * unit
    zeros = (low / steps * KEY_ZERO_STEPS).round().clamp(-128, 127)
    integers = torch.minimum((x / steps - zeros / KEY_ZERO_STEPS).round().clamp(min=0), top)
    return Quantized(
        integers.to(torch.uint8),
        scales.to(torch.uint8),
        steps,
        zeros.to(torch.int8),
        KEY_ZERO_STEPS,
    )


def dequantize_keys(quantized: Quantized, frame: KeyFrame, low_format: LowFormat) -> torch.Tensor:
    """Undo :func:`quantize_keys`, float32."""
    ranked = quantized.dequantize()
    return frame.restore(ranked * frame.unit.float() if low_format.keys_per_token else ranked)


def quantize_values(values: torch.Tensor, bits: int) -> Quantized:
    """Rotate values ``[..., 32, head_dim]`` and quantize them per token and group of channels.

    Returns integers ``[..., groups, 32, head_dim / groups]``.
    """
    groups = max(1, values.shape[-1] // VALUE_GROUP)
    split = rotate(values).reshape(*values.shape[:-1], groups, values.shape[-1] // groups)
    return _per_token(split.movedim(-2, -3), bits)


def _per_token(x: torch.Tensor, bits: int) -> Quantized:
    """Quantize along the last axis."""
    top = (1 << bits) - 1
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scales = encode_scale(torch.maximum((high - low) / top, low.abs() / 127))
    steps = decode_scale(scales)
    zeros = (low / steps).round().clamp(-128, 127)
    integers = ((x / steps).round() - zeros).clamp(0, top)
    return Quantized(integers.to(torch.uint8), scales, steps, zeros.to(torch.int8))


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
