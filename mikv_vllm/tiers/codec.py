"""The codecs in plain torch: what every kernel is tested against.

Low tier, codec ``channel``: keys asymmetric per channel over a chunk of 32 tokens, values
asymmetric per token in groups of channels, after a Hadamard rotation of the channels.
A key's scale is a multiple, 1 to 255, of its channel's unit, and its zero point an int8 in halves
of the scale, counted from the channel's centre. Both ends of a chunk's range are met within a few
per cent of a step so: the keys at the ends are the ones that attention tells apart. Centre and unit
are kept once per request and head (:func:`key_frame`). When a prompt is compressed, its last
queries say which errors matter, and the rounding of one channel makes up for that of others
(:func:`key_feedback`); the stored form is the same.
A value's scale is an 8-bit float (:func:`encode_scale`), its zero point an int8 in whole scales.
High tier, 8 bits: symmetric per token, one fp16 scale each for key and value.
"""

from dataclasses import dataclass
from functools import cache

import torch

from mikv_vllm.tiers.formats import KEY_ZERO_STEPS, LowFormat, LowLayout

SCALE_BIAS = 22
"""Exponent bias of the 8-bit scale: 5 bits of exponent, 3 of mantissa, no sign."""
FEEDBACK_DAMPING = 1.0
"""Share of the queries' mean square that is added to every channel's in :func:`key_feedback`."""
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
    """What a request's keys are measured against in one head: fp16 ``[head_dim]`` each."""

    center: torch.Tensor
    unit: torch.Tensor


def key_frame(keys: torch.Tensor, low_keys: torch.Tensor, bits: int) -> KeyFrame:
    """Centre and unit of a head.

    Args:
        keys: ``[tokens, head_dim]``, all of the request; their mean is the centre.
        low_keys: ``[n, head_dim]``, those that become low; all keys if there are none. The unit
            lets a scale cover twice the farthest of them from the centre.
    """
    center = keys.float().mean(0).clamp(-65504, 65504).to(torch.float16)
    far = (low_keys if len(low_keys) else keys).float() - center.float()
    unit = far.abs().amax(0) * (2 / (255 * ((1 << bits) - 1)))
    return KeyFrame(center, unit.clamp(6e-8, 65504).to(torch.float16))


@dataclass(frozen=True)
class KeyFeedback:
    """How the errors of channels already rounded move the next one's target.

    ``order``: channels as they are rounded, ``[..., head_dim]``. ``weights``: float32
    ``[..., head_dim, head_dim]``; the target of the ``r``-th channel is its key plus
    ``weights[r, :r] @ errors``, an error being key minus what is stored.
    """

    order: torch.Tensor
    weights: torch.Tensor


def key_feedback(queries: torch.Tensor, unit: torch.Tensor) -> KeyFeedback:
    """Feedback that keeps the error of the logits small, rather than that of the keys.

    The logits' squared error over queries like these is ``e H e`` with their second moment ``H``.
    With ``H = L D L'`` (unit lower triangle, last channel first) it splits into one square per
    channel, which holds that channel's error and those before it: each rounding minimizes its own,
    as in GPTQ (Frantar et al., 2022) and Babai's nearest plane. Queries to come are not these
    queries, so ``H`` gets :data:`FEEDBACK_DAMPING` times its mean diagonal added. Channels
    whose rounding costs most go first.

    Args:
        queries: ``[..., n, head_dim]``, the prompt's last ones, of all query heads of the KV head.
        unit: ``[..., head_dim]``, of the head's :class:`KeyFrame`.
    """
    q = queries.double()
    moment = q.mT @ q / q.shape[-2]
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    damping = (FEEDBACK_DAMPING * diagonal.mean(-1)).clamp(min=1e-30)[..., None, None]
    moment = moment + damping * torch.eye(q.shape[-1], dtype=torch.float64, device=q.device)
    cost = (moment.diagonal(dim1=-2, dim2=-1) * unit.double() ** 2).float()
    order = cost.argsort(dim=-1, descending=True, stable=True)
    last_first = order.flip(-1)
    moment = moment.take_along_dim(last_first[..., :, None], -2)
    moment = moment.take_along_dim(last_first[..., None, :], -1)
    # The damping makes it positive definite; checking would wait for the device.
    factor = torch.linalg.cholesky_ex(moment).L
    unit_factor = factor / factor.diagonal(dim1=-2, dim2=-1)[..., None, :]
    return KeyFeedback(order, unit_factor.flip(-2, -1).mT.tril(-1).float().contiguous())


def quantize_keys(
    keys: torch.Tensor, frame: KeyFrame, bits: int, feedback: KeyFeedback | None = None
) -> Quantized:
    """Quantize chunks of one head's keys ``[..., 32, head_dim]`` per channel."""
    x, unit = keys.float() - frame.center.float(), frame.unit.float()
    top = (1 << bits) - 1
    low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    # The second term keeps the zero point within an int8 where a chunk lies far from the centre.
    scale = torch.maximum((high - low) / top, low.abs() * (KEY_ZERO_STEPS / 127))
    scales = (scale / unit).ceil().clamp(1, 255)
    steps = scales * unit
    zeros = (low / steps * KEY_ZERO_STEPS).round().clamp(-128, 127)
    offsets = zeros / KEY_ZERO_STEPS
    if feedback is None:
        integers = (x / steps - offsets).round().clamp(0, top)
    else:
        integers, errors = torch.empty_like(x), x[..., :0]
        for channel, weights in zip(feedback.order.tolist(), feedback.weights, strict=True):
            target = x[..., channel] + errors @ weights[: errors.shape[-1]]
            step, offset = steps[..., channel], offsets[..., channel]
            integers[..., channel] = (target / step - offset).round().clamp(0, top)
            error = x[..., channel] - step * (integers[..., channel] + offset)
            errors = torch.cat([errors, error[..., None]], -1)
    return Quantized(
        integers.to(torch.uint8),
        scales.to(torch.uint8),
        steps,
        zeros.to(torch.int8),
        KEY_ZERO_STEPS,
    )


def quantize_values(values: torch.Tensor, bits: int) -> Quantized:
    """Rotate values ``[..., 32, head_dim]`` and quantize them per token and group of channels.

    Returns integers ``[..., groups, 32, head_dim / groups]``.
    """
    layout = LowLayout(values.shape[-1], LowFormat(4, bits))
    groups = layout.value_groups
    split = rotate(values).reshape(*values.shape[:-1], groups, values.shape[-1] // groups)
    x = split.movedim(-2, -3)
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
