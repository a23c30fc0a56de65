"""Every token at the same few bits."""

from dataclasses import dataclass
from functools import cache

import torch

from mikv_vllm.evaluation.methods.base import (
    NATIVE_BYTES,
    CacheMethod,
    HeadCache,
    Stored,
    by_groups,
    quantize,
)
from mikv_vllm.tiers.codec import rotate

PAIR_BYTES = 4
"""A scale and an offset, fp16."""
GROUP_CHANNELS = 64
HIGH_RECORD_TOKENS = 32


@dataclass(frozen=True)
class PerToken(CacheMethod):
    """Keys and values quantized per token, in groups of 64 channels, asymmetric."""

    bits: int
    family = "per-token"

    @property
    def setting(self) -> str:
        return f"{self.bits} bits"

    def store(self, cache: HeadCache) -> Stored:
        tokens, head_dim = cache.keys.shape
        groups = max(1, head_dim // GROUP_CHANNELS)
        each = 2 * (head_dim * self.bits / 8 + PAIR_BYTES * groups)
        keys = by_groups(cache.keys, self.bits, GROUP_CHANNELS)
        values = by_groups(cache.values, self.bits, GROUP_CHANNELS)
        return Stored(keys, values, tokens * each)


def balancer(cache: HeadCache) -> torch.Tensor:
    """Per-channel factor on the keys that evens out outliers: ``sqrt(max|Q| / max|K|)``.

    Source: the paper, section 3.3; queries are divided by it, so logits stay.
    """
    largest_key = cache.keys.abs().amax(0).clamp(min=1e-6)
    return (cache.largest_query.clamp(min=1e-6) / largest_key).sqrt()


@dataclass(frozen=True)
class Balanced(CacheMethod):
    """:class:`PerToken` with keys multiplied by the paper's balancer, kept once in fp16."""

    bits: int
    family = "per-token, balanced"

    @property
    def setting(self) -> str:
        return f"{self.bits} bits"

    def store(self, cache: HeadCache) -> Stored:
        factor = balancer(cache)
        plain = PerToken(self.bits).store(cache)
        keys = by_groups(cache.keys * factor, self.bits, GROUP_CHANNELS) / factor
        return Stored(keys, plain.values, plain.num_bytes + NATIVE_BYTES * cache.head_dim)


@dataclass(frozen=True)
class PerChannelKeys(CacheMethod):
    """Keys per channel over 32 tokens, values per token; tokens short of 32 at the end in fp16.

    Source: KIVI (Liu et al., 2024), with its groups of 32.
    """

    bits: int
    family = "per-channel keys"

    @property
    def setting(self) -> str:
        return f"{self.bits} bits"

    def store(self, cache: HeadCache) -> Stored:
        tokens, head_dim = cache.keys.shape
        whole = tokens // HIGH_RECORD_TOKENS * HIGH_RECORD_TOKENS
        keys, values = cache.keys.clone(), cache.values.clone()
        grouped = keys[:whole].unflatten(0, (-1, HIGH_RECORD_TOKENS))
        keys[:whole] = quantize(grouped, self.bits, 1).flatten(0, 1)
        values[:whole] = by_groups(values[:whole], self.bits, HIGH_RECORD_TOKENS)
        key_bytes = head_dim * (self.bits / 8 + PAIR_BYTES / HIGH_RECORD_TOKENS)
        value_bytes = head_dim * self.bits / 8 + PAIR_BYTES * head_dim / HIGH_RECORD_TOKENS
        rest = (tokens - whole) * 2 * NATIVE_BYTES * head_dim
        return Stored(keys, values, whole * (key_bytes + value_bytes) + rest)


@cache
def lloyd_max(bits: int) -> torch.Tensor:
    """Levels that quantize a standard normal number with the least squared error, ascending."""
    x = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2)
    levels = torch.linspace(-2, 2, 1 << bits, dtype=torch.float64)
    for _ in range(400):
        nearest = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add(0, nearest, density)
        levels = torch.zeros_like(levels).index_add(0, nearest, density * x) / mass
    return levels.float()


@dataclass(frozen=True)
class RotatedLloydMax(CacheMethod):
    """Tokens rotated by a Hadamard matrix, then rounded to a normal number's best levels.

    A token's norm is kept in fp16. Source: TurboQuant (Zandieh et al., 2025), without its residual.
    """

    bits: int
    family = "rotated, Lloyd-Max"

    @property
    def setting(self) -> str:
        return f"{self.bits} bits"

    def store(self, cache: HeadCache) -> Stored:
        each = 2 * (cache.head_dim * self.bits / 8 + NATIVE_BYTES)
        keys, values = self._round(cache.keys), self._round(cache.values)
        return Stored(keys, values, cache.num_tokens * each)

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[1] ** 0.5
        norm = x.norm(dim=1, keepdim=True).half().float().clamp(min=1e-6)
        levels = lloyd_max(self.bits)
        normal = rotate(x) / norm * size
        places = torch.bucketize(normal, (levels[1:] + levels[:-1]) / 2)
        return rotate(levels[places] * norm / size)
