"""4-bit floating-point numbers in blocks of 16, as in NVFP4."""

from dataclasses import dataclass

import torch

from mikv_vllm.evaluation.methods.base import CacheMethod, HeadCache, Stored

BLOCK = 16
"""Channels of one token that share a scale."""
LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Magnitudes of a number with 2 bits of exponent and 1 bit of mantissa."""


@dataclass(frozen=True)
class NVFP4(CacheMethod):
    """Round keys and values to 4-bit floats, with an 8-bit float scale for 16 channels.

    The scale of the whole tensor, which is one number, is left out. Source: NVIDIA's description of
    the format, https://developer.nvidia.com/blog/introducing-nvfp4-for-efficient-and-accurate-low-precision-inference/.
    """

    family = "NVFP4"

    @property
    def setting(self) -> str:
        return "4 bits"

    def store(self, cache: HeadCache) -> Stored:
        token_bytes = 2 * cache.head_dim * (1 / 2 + 1 / BLOCK)
        keys, values = _round(cache.keys), _round(cache.values)
        return Stored(keys, values, cache.num_tokens * token_bytes)


def _round(x: torch.Tensor) -> torch.Tensor:
    blocks = x.unflatten(1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / LEVELS[-1]
    scale = scale.to(torch.float8_e4m3fn).float().clamp(min=2.0**-9)
    magnitude = (blocks / scale).abs().clamp(max=float(LEVELS[-1]))
    nearest = torch.bucketize(magnitude, (LEVELS[1:] + LEVELS[:-1]) / 2)
    return (LEVELS[nearest] * scale).copysign(blocks).flatten(1)
