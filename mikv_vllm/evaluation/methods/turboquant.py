"""TurboQuant: a rotation, then a quantizer for normally distributed numbers."""

from dataclasses import dataclass
from functools import cache

import torch

from mikv_vllm.evaluation.methods.base import CacheMethod, HeadCache, Stored
from mikv_vllm.tiers.codec import rotate
from mikv_vllm.tiers.formats import NATIVE_BYTES


@cache
def lloyd_max(bits: int) -> torch.Tensor:
    """Compute the levels that quantize a standard normal number with the least squared error.

    Source: Max (1960), "Quantizing for minimum distortion".

    Returns:
        float32 ``[2**bits]``, ascending.
    """
    x = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2)
    levels = torch.linspace(-2, 2, 1 << bits, dtype=torch.float64)
    for _ in range(400):
        nearest = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add(0, nearest, density)
        levels = torch.zeros_like(levels).index_add(0, nearest, density * x) / mass
    return levels.float()


@dataclass(frozen=True)
class TurboQuant(CacheMethod):
    """Rotate each key and value by a Hadamard matrix, and round it to the levels of Lloyd and Max.

    The norm of each vector is stored in fp16. The residual of the paper is left out. Source:
    TurboQuant (Zandieh et al., 2025, arXiv:2504.19874).

    Args:
        bits (int): bits of a key and of a value, per channel.
    """

    bits: int
    family = "rotated, Lloyd-Max"

    @property
    def setting(self) -> str:
        return f"{self.bits} bits"

    def store(self, cache: HeadCache) -> Stored:
        token_bytes = 2 * (cache.head_dim * self.bits / 8 + NATIVE_BYTES)
        keys, values = (round_rotated(x, self.bits) for x in (cache.keys, cache.values))
        return Stored(keys, values, cache.num_tokens * token_bytes)


def round_rotated(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Rotate keys or values ``[tokens, head_dim]``, quantize them, and rotate them back."""
    return rotate(round_normal(rotate(x), bits))


def round_normal(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Quantize vectors ``[tokens, channels]`` and back, as if each was normally distributed.

    The norm of each vector is rounded to fp16.
    """
    size = x.shape[1] ** 0.5
    norm = x.norm(dim=1, keepdim=True).half().float().clamp(min=1e-6)
    levels = lloyd_max(bits)
    nearest = torch.bucketize(x / norm * size, (levels[1:] + levels[:-1]) / 2)
    return levels[nearest] * norm / size
