"""The channel balancer of the MiKV paper, alone."""

from dataclasses import dataclass

import torch

from mikv_vllm.evaluation.methods.base import CacheMethod, HeadCache, Stored
from mikv_vllm.evaluation.methods.per_token import PerToken
from mikv_vllm.evaluation.methods.quantization import quantize_per_token
from mikv_vllm.tiers.formats import NATIVE_BYTES


def balancer(cache: HeadCache) -> torch.Tensor:
    """Compute the factor of each key channel that reduces outliers: ``sqrt(max|Q| / max|K|)``.

    Keys are multiplied by it before they are quantized, and queries are divided by it, so that the
    logits do not change. Source: arXiv:2402.18096, section 3.3.

    Returns:
        float32 ``[head_dim]``.
    """
    largest_key = cache.keys.abs().amax(0).clamp(min=1e-6)
    return (cache.largest_query.clamp(min=1e-6) / largest_key).sqrt()


@dataclass(frozen=True)
class Balanced(CacheMethod):
    """Quantize all tokens as :class:`PerToken` does, with balanced keys.

    The balancer is stored once, in fp16. Source: arXiv:2402.18096, section 3.3.

    Args:
        bits (int): bits of a key and of a value, per channel.
    """

    bits: int
    family = "per-token, balanced"

    @property
    def setting(self) -> str:
        return f"{self.bits} bits"

    def store(self, cache: HeadCache) -> Stored:
        factor = balancer(cache)
        plain = PerToken(self.bits).store(cache)
        keys = quantize_per_token(cache.keys * factor, self.bits) / factor
        return Stored(keys, plain.values, plain.num_bytes + NATIVE_BYTES * cache.head_dim)
