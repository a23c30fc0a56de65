"""The baseline of quantization: every token at the same few bits."""

from dataclasses import dataclass

from mikv_vllm.evaluation.methods.base import CacheMethod, HeadCache, Stored
from mikv_vllm.evaluation.methods.quantization import per_token_bytes, quantize_per_token


@dataclass(frozen=True)
class PerToken(CacheMethod):
    """Quantize the keys and values of all tokens per token, with one scale for 64 channels.

    Args:
        bits (int): bits of a key and of a value, per channel.
    """

    bits: int
    family = "per-token"

    @property
    def setting(self) -> str:
        return f"{self.bits} bits"

    def store(self, cache: HeadCache) -> Stored:
        return Stored(
            quantize_per_token(cache.keys, self.bits),
            quantize_per_token(cache.values, self.bits),
            cache.num_tokens * 2 * per_token_bytes(cache.head_dim, self.bits),
        )
