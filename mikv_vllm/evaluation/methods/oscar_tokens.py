"""OScaR: rotated keys whose tokens are scaled to one norm, then quantization per channel."""

from dataclasses import dataclass

from mikv_vllm.evaluation.methods.base import CacheMethod, HeadCache, Stored
from mikv_vllm.evaluation.methods.quantization import (
    METADATA_BYTES,
    per_token_bytes,
    quantize,
    quantize_per_token,
)
from mikv_vllm.tiers.codec import rotate
from mikv_vllm.tiers.formats import NATIVE_BYTES

GROUP = 128
"""Tokens that share the scale of a key channel."""


@dataclass(frozen=True)
class OScaR(CacheMethod):
    """Rotate keys by a Hadamard matrix, divide each by its norm, and quantize them per channel.

    The norm of each key is stored in fp16. Values are rotated and quantized per token. The tokens
    at the end that do not fill a group stay at 16 bits. Source: OScaR (Su et al., 2026,
    arXiv:2605.19660).

    Args:
        bits (int): bits of a key and of a value, per channel.
    """

    bits: int
    family = "OScaR"

    @property
    def setting(self) -> str:
        return f"{self.bits} bits"

    def store(self, cache: HeadCache) -> Stored:
        tokens, head_dim = cache.keys.shape
        whole = tokens // GROUP * GROUP
        keys, values = cache.keys.clone(), cache.values.clone()
        rotated = rotate(keys[:whole])
        norms = rotated.norm(dim=1, keepdim=True).half().float().clamp(min=1e-6)
        grouped = (rotated / norms).unflatten(0, (-1, GROUP))
        keys[:whole] = rotate(quantize(grouped, self.bits, 1).flatten(0, 1) * norms)
        values[:whole] = rotate(quantize_per_token(rotate(values[:whole]), self.bits))
        key_bytes = head_dim * (self.bits / 8 + METADATA_BYTES / GROUP) + NATIVE_BYTES
        value_bytes = per_token_bytes(head_dim, self.bits)
        rest_bytes = (tokens - whole) * 2 * NATIVE_BYTES * head_dim
        return Stored(keys, values, whole * (key_bytes + value_bytes) + rest_bytes)
