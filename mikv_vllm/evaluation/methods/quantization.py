"""Asymmetric round-to-nearest quantization, which several methods share."""

import torch

GROUP_CHANNELS = 64
"""Channels of one token that share a scale and an offset."""
METADATA_BYTES = 4
"""Bytes of a scale and an offset, fp16 each."""


def quantize(x: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Quantize ``x`` to integers and back, with one fp16 scale and offset along ``axis``.

    Returns:
        float32, with the shape of ``x``.
    """
    top = (1 << bits) - 1
    low = x.amin(axis, keepdim=True)
    scale = ((x.amax(axis, keepdim=True) - low) / top).clamp(min=6e-8).half().float()
    low = low.half().float()
    return ((x - low) / scale).round().clamp(0, top) * scale + low


def quantize_per_token(
    x: torch.Tensor, bits: int, group_channels: int = GROUP_CHANNELS
) -> torch.Tensor:
    """Quantize keys or values per token and back.

    Args:
        x: ``[tokens, head_dim]``.
        bits: of each integer.
        group_channels: channels that share a scale and an offset; all channels if ``head_dim`` is
            smaller.

    Returns:
        float32 ``[tokens, head_dim]``.
    """
    groups = _num_groups(x.shape[1], group_channels)
    return quantize(x.unflatten(1, (groups, -1)), bits, -1).flatten(1)


def per_token_bytes(head_dim: int, bits: int, group_channels: int = GROUP_CHANNELS) -> float:
    """Bytes of one key or one value that :func:`quantize_per_token` stores."""
    return head_dim * bits / 8 + METADATA_BYTES * _num_groups(head_dim, group_channels)


def _num_groups(head_dim: int, group_channels: int) -> int:
    return max(1, head_dim // group_channels)
