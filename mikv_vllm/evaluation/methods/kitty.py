"""Kitty: keys per channel at 2 bits, the most sensitive channels at 4."""

from dataclasses import dataclass

import torch

from mikv_vllm.evaluation.methods.base import CacheMethod, HeadCache, Stored
from mikv_vllm.evaluation.methods.quantization import (
    METADATA_BYTES,
    per_token_bytes,
    quantize,
    quantize_per_token,
)
from mikv_vllm.tiers.formats import NATIVE_BYTES

SINKS = 32
"""First tokens, which stay at 16 bits."""
GROUP = 128
"""Tokens that share the scale of a key channel."""
LOW_BITS, BOOSTED_BITS = 2, 4


@dataclass(frozen=True)
class Kitty(CacheMethod):
    """Quantize keys per channel at 2 or 4 bits, and values per token at 2 bits.

    In each group of 128 tokens, the channels with the largest mean magnitude have 4 bits. The first
    32 tokens, and those at the end that do not fill a group, stay at 16 bits. Source: Kitty (Xia et
    al., 2025, arXiv:2511.18643).

    Args:
        boosted (float): share of the key channels that have 4 bits.
    """

    boosted: float
    family = "per-channel keys, boosted"

    @property
    def setting(self) -> str:
        return f"2 bits, {self.boosted:.1%} at 4"

    def store(self, cache: HeadCache) -> Stored:
        tokens, head_dim = cache.keys.shape
        groups = max(0, tokens - SINKS) // GROUP
        end = SINKS + groups * GROUP
        keys, values = cache.keys.clone(), cache.values.clone()
        grouped = keys[SINKS:end].unflatten(0, (groups, GROUP))
        count = round(self.boosted * head_dim)
        magnitude = grouped.abs().mean(1, keepdim=True)
        rank = magnitude.argsort(-1, descending=True).argsort(-1)
        low, high = (quantize(grouped, bits, 1) for bits in (LOW_BITS, BOOSTED_BITS))
        keys[SINKS:end] = torch.where(rank < count, high, low).flatten(0, 1)
        values[SINKS:end] = quantize_per_token(values[SINKS:end], LOW_BITS)
        key_bits = LOW_BITS * head_dim + (BOOSTED_BITS - LOW_BITS) * count
        # A bit for each channel of a group says whether it is boosted.
        key_bytes = key_bits / 8 + head_dim * (METADATA_BYTES + 1 / 8) / GROUP
        token_bytes = key_bytes + per_token_bytes(head_dim, LOW_BITS)
        rest = tokens - groups * GROUP
        native_bytes = rest * 2 * NATIVE_BYTES * head_dim
        return Stored(keys, values, groups * GROUP * token_bytes + native_bytes)
