"""MiKV as its paper describes it."""

from dataclasses import dataclass

import torch

from mikv_vllm.evaluation.methods.balanced import balancer
from mikv_vllm.evaluation.methods.base import CacheMethod, HeadCache, Stored
from mikv_vllm.evaluation.methods.quantization import per_token_bytes, quantize_per_token
from mikv_vllm.tiers.formats import NATIVE_BYTES


@dataclass(frozen=True)
class PaperMiKV(CacheMethod):
    """Keep heavy hitters and recent tokens at many bits, and the other tokens at few bits.

    The low tier is quantized per token, with balanced keys. Source: MiKV (Yang et al., 2024,
    arXiv:2402.18096), section 3.

    Args:
        low_bits (int): bits of the low tier: 2, 3 or 4.
        high_bits (int): bits of the high tier: 16, or 8, quantized per token.
        high_share (float, default 0.2): share of tokens in the high tier. Half of them are the most
            recent tokens.
        inverted (bool, default False): put the least important tokens into the high tier instead of
            the most important ones, which shows the effect of importance.
    """

    low_bits: int
    high_bits: int
    high_share: float = 0.2
    inverted: bool = False

    reads_attention = True

    @property
    def family(self) -> str:  # type: ignore[override]
        return f"MiKV (paper), {self.high_bits}-bit high"

    @property
    def setting(self) -> str:
        which = "least important " if self.inverted else ""
        return f"{self.low_bits} bits, {which}{self.high_share:.0%} high"

    def store(self, cache: HeadCache) -> Stored:
        tokens, head_dim = cache.keys.shape
        num_high = int(self.high_share * tokens)
        assert cache.attention is not None
        priority = cache.attention.clone()
        priority[tokens - num_high // 2 :] = torch.inf
        high = priority.topk(num_high, largest=not self.inverted).indices
        factor = balancer(cache)
        keys = quantize_per_token(cache.keys * factor, self.low_bits) / factor
        values = quantize_per_token(cache.values, self.low_bits)
        keys[high], values[high] = self._high(cache.keys[high]), self._high(cache.values[high])
        low_bytes = 2 * per_token_bytes(head_dim, self.low_bits)
        total = num_high * self._high_bytes(head_dim) + (tokens - num_high) * low_bytes
        return Stored(keys, values, total + NATIVE_BYTES * head_dim)

    def _high(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values ``[high_tokens, head_dim]`` as the high tier returns them."""
        return x if self.high_bits == 8 * NATIVE_BYTES else quantize_per_token(x, self.high_bits)

    def _high_bytes(self, head_dim: int) -> float:
        """Bytes of a token in the high tier."""
        if self.high_bits == 8 * NATIVE_BYTES:
            return 2 * NATIVE_BYTES * head_dim
        return 2 * per_token_bytes(head_dim, self.high_bits)
