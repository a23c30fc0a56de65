"""KIVI: keys per channel, values per token."""

from dataclasses import dataclass

from mikv_vllm.evaluation.methods.base import CacheMethod, HeadCache, Stored
from mikv_vllm.evaluation.methods.quantization import (
    METADATA_BYTES,
    per_token_bytes,
    quantize,
    quantize_per_token,
)
from mikv_vllm.tiers.formats import NATIVE_BYTES

GROUP = 32
"""Tokens that share the scale of a key channel, and channels that share the scale of a value."""


@dataclass(frozen=True)
class KIVI(CacheMethod):
    """Quantize keys per channel over 32 tokens, and values per token over 32 channels.

    The tokens at the end that do not fill 32 stay at 16 bits; there is no other residual of recent
    tokens. Source: KIVI (Liu et al., 2024, arXiv:2402.02750).

    Args:
        bits (int): bits of a key and of a value, per channel.
    """

    bits: int
    family = "per-channel keys"

    @property
    def setting(self) -> str:
        return f"{self.bits} bits"

    def store(self, cache: HeadCache) -> Stored:
        tokens, head_dim = cache.keys.shape
        whole = tokens // GROUP * GROUP
        keys, values = cache.keys.clone(), cache.values.clone()
        keys[:whole] = quantize(keys[:whole].unflatten(0, (-1, GROUP)), self.bits, 1).flatten(0, 1)
        values[:whole] = quantize_per_token(values[:whole], self.bits, GROUP)
        key_bytes = head_dim * (self.bits / 8 + METADATA_BYTES / GROUP)
        value_bytes = per_token_bytes(head_dim, self.bits, GROUP)
        rest_bytes = (tokens - whole) * 2 * NATIVE_BYTES * head_dim
        return Stored(keys, values, whole * (key_bytes + value_bytes) + rest_bytes)
