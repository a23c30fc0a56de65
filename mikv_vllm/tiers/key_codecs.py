"""Quantization of keys in the low tier: one class for each codec, in plain torch.

- ``channel`` (:class:`ChannelKeys`): one scale per channel and record. Channels are ranked by the
  cost of rounding them, and the costly ones get more bits.
- ``balanced`` (:class:`BalancedKeys`): one scale per token, after the channel balancer of the MiKV
  paper, all channels with the same bits.

When a request is compressed, the codec computes a :class:`KeyFrame` for each layer and KV head. It
is stored in the header of the stream and used for all low records of that stream.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from mikv_vllm.tiers.codec import (
    Quantized,
    decode_scale,
    grid_start,
    quantize_per_token,
)
from mikv_vllm.tiers.formats import (
    CHANNEL_MARGIN,
    KEY_ZERO_STEPS,
    LOW_RECORD_TOKENS,
    Codec,
    LowFormat,
)


@dataclass(frozen=True)
class KeyFrame:
    """Order, centre and unit of the key channels of one head, by rank: ``[head_dim]`` each.

    ``order``: int64, the channel at each rank. ``center``, ``unit``: fp16.
    """

    order: torch.Tensor
    center: torch.Tensor
    unit: torch.Tensor

    def rank(self, keys: torch.Tensor) -> torch.Tensor:
        """Order the channels of keys ``[..., head_dim]`` by rank, minus their centres, float32."""
        return keys[..., self.order].float() - self.center.float()

    def restore(self, ranked: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`rank`."""
        keys = torch.empty_like(ranked)
        keys[..., self.order] = ranked + self.center.float()
        return keys


class KeyCodec(Protocol):
    """How the keys of one head are quantized in the low tier."""

    def frame(
        self,
        keys: torch.Tensor,
        low_keys: torch.Tensor,
        queries: torch.Tensor,
        low_format: LowFormat,
    ) -> KeyFrame:
        """Compute the frame of a request.

        Args:
            keys: ``[tokens, head_dim]``, all keys of the request.
            low_keys: ``[m, head_dim]``, the keys of the low tier; ``m`` is a multiple of 32, or 0.
            queries: ``[n, head_dim]``, the last queries of the prompt, of all query heads that
                share the KV head.
        """
        ...

    def quantize(self, keys: torch.Tensor, frame: KeyFrame, low_format: LowFormat) -> Quantized:
        """Quantize the keys of low records, ``[..., 32, head_dim]``; integers are by rank."""
        ...

    def stored(
        self, integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, frame: KeyFrame
    ) -> Quantized:
        """Rebuild the result of :meth:`quantize` for one record.

        Args:
            integers: ``[32, head_dim]``, by rank.
            scales, zeros: uint8 and int8, flat, as in a record.
        """
        ...

    def dequantize(self, quantized: Quantized, frame: KeyFrame) -> torch.Tensor:
        """Undo :meth:`quantize`, float32."""
        ...


class ChannelKeys:
    """Asymmetric quantization per channel of a low record.

    A scale is a multiple, 1 to 255, of the unit of its channel. A zero point is an int8 in units of
    half the scale, relative to the centre of its channel.

    Bits by rank are reverse water-filling in steps (Cover and Thomas, Elements of Information
    Theory, 10.3.3): at equal bits, the costs of channels differ by orders of magnitude.
    """

    def frame(
        self,
        keys: torch.Tensor,
        low_keys: torch.Tensor,
        queries: torch.Tensor,
        low_format: LowFormat,
    ) -> KeyFrame:
        """See :class:`KeyCodec`. The centre is the mean of ``keys``.

        With the unit, a scale can cover twice the largest distance of a low key from the centre.
        Without low keys, channels keep their order, and the unit covers all keys.
        """
        cost = key_cost(queries, low_keys) if len(low_keys) else torch.zeros(keys.shape[1])
        order = cost.argsort(descending=True, stable=True)
        center = keys.float().mean(0).clamp(-65504, 65504).to(torch.float16)
        far = ((low_keys if len(low_keys) else keys).float() - center.float()).abs().amax(0)
        unit = far[order] * (2 / (255 * _largest_integers(low_format, keys.shape[1])))
        return KeyFrame(order, center[order], unit.clamp(6e-8, 65504).to(torch.float16))

    def quantize(self, keys: torch.Tensor, frame: KeyFrame, low_format: LowFormat) -> Quantized:
        x, unit = frame.rank(keys), frame.unit.float()
        top = _largest_integers(low_format, keys.shape[-1])
        low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
        # The second term keeps the zero point in the range of int8 if the keys are far from the
        # centre.
        wanted = (high - low) / (top + 2 * CHANNEL_MARGIN)
        scale = torch.maximum(wanted, low.abs() * (KEY_ZERO_STEPS / 127))
        scales = (scale / unit).ceil().clamp(1, 255)
        steps = scales * unit
        zeros = (grid_start(low, high, steps, top) * KEY_ZERO_STEPS).round().clamp(-128, 127)
        integers = torch.minimum((x / steps - zeros / KEY_ZERO_STEPS).round().clamp(min=0), top)
        return Quantized(
            integers.to(torch.uint8),
            scales.to(torch.uint8),
            steps,
            zeros.to(torch.int8),
            KEY_ZERO_STEPS,
        )

    def stored(
        self, integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, frame: KeyFrame
    ) -> Quantized:
        steps = scales.float() * frame.unit.float()
        return Quantized(integers, scales, steps, zeros, KEY_ZERO_STEPS)

    def dequantize(self, quantized: Quantized, frame: KeyFrame) -> torch.Tensor:
        return frame.restore(quantized.dequantize())


class BalancedKeys:
    """Asymmetric quantization per token, after division of each channel by its unit.

    The unit is the inverse of the balancer of the MiKV paper (arXiv:2402.18096, section 3.3). The
    frame keeps the channels in their order, with centres of 0.
    """

    def frame(
        self,
        keys: torch.Tensor,
        low_keys: torch.Tensor,
        queries: torch.Tensor,
        low_format: LowFormat,
    ) -> KeyFrame:
        """See :class:`KeyCodec`. The unit of a channel is the square root of its largest key
        divided by its largest query, in magnitude."""
        largest_key = keys.float().abs().amax(0)
        largest_query = queries.float().abs().amax(0).clamp(min=1e-6)
        unit = (largest_key / largest_query).sqrt().clamp(1e-3, 65504).to(torch.float16)
        return KeyFrame(torch.arange(len(unit)), torch.zeros_like(unit), unit)

    def quantize(self, keys: torch.Tensor, frame: KeyFrame, low_format: LowFormat) -> Quantized:
        return quantize_per_token(frame.rank(keys) / frame.unit.float(), low_format.key_bits[0])

    def stored(
        self, integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, frame: KeyFrame
    ) -> Quantized:
        return Quantized(integers, scales, decode_scale(scales)[:, None], zeros[:, None])

    def dequantize(self, quantized: Quantized, frame: KeyFrame) -> torch.Tensor:
        return frame.restore(quantized.dequantize() * frame.unit.float())


KEY_CODECS: dict[Codec, KeyCodec] = {"channel": ChannelKeys(), "balanced": BalancedKeys()}
"""By name."""


def key_codec(low_format: LowFormat) -> KeyCodec:
    """Return the key codec of a low format."""
    return KEY_CODECS[low_format.codec]


def key_cost(queries: torch.Tensor, low_keys: torch.Tensor) -> torch.Tensor:
    """Compute the cost of rounding each key channel to the same number of bits, up to a factor.

    The squared error of the logits is proportional to the square of the query, and to the square of
    the quantization step, which is proportional to the range of the channel in a low record.

    Args:
        queries: ``[n, head_dim]``.
        low_keys: ``[m, head_dim]``; ``m`` is a multiple of 32.

    Returns:
        float32 ``[head_dim]``.
    """
    records = low_keys.float().unflatten(0, (-1, LOW_RECORD_TOKENS))
    ranges = (records.amax(1) - records.amin(1)).double().square().sum(0)
    return (queries.double().square().sum(0) * ranges).float()


def _largest_integers(low_format: LowFormat, head_dim: int) -> torch.Tensor:
    """Largest integer of each key channel, by rank: float32 ``[head_dim]``."""
    return torch.tensor([(1 << bits) - 1.0 for bits in low_format.channel_bits(head_dim)])
