"""OSCAR: a rotation that follows the covariance of the queries, then quantization per token."""

from dataclasses import dataclass

import torch

from mikv_vllm.evaluation.methods.base import CacheMethod, HeadCache, Stored
from mikv_vllm.evaluation.methods.quantization import METADATA_BYTES
from mikv_vllm.tiers.codec import rotate
from mikv_vllm.tiers.formats import NATIVE_BYTES

PROTECTED = 16
"""First tokens, and last tokens, that stay at 16 bits."""
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Shares of a token's range that are tried as its clipping threshold."""


@dataclass(frozen=True)
class OSCAR(CacheMethod):
    """Rotate keys and values into the basis in which attention reads them, and quantize per token.

    The basis of the keys is that of the queries' second moments, the basis of the values that of
    their own, weighted by attention. A Hadamard matrix then mixes the channels. All channels of a
    token share a scale and an offset, with a clipping threshold. The first and last 16 tokens stay
    at 16 bits. The paper fits bases and thresholds once for a model. Here they are fitted to each
    prompt, which favours the method. Source: OSCAR (Zhou et al., 2026, arXiv:2605.17757).

    Args:
        bits (int): bits of a key and of a value, per channel.
    """

    bits: int
    family = "OSCAR"

    @property
    def setting(self) -> str:
        return f"{self.bits} bits"

    def store(self, cache: HeadCache) -> Stored:
        tokens, head_dim = cache.keys.shape
        middle = slice(PROTECTED, tokens - PROTECTED)
        keys, values = cache.keys.clone(), cache.values.clone()
        weights = cache.window_attention[:, None]
        keys[middle] = self._round(keys[middle], cache.queries.T @ cache.queries)
        values[middle] = self._round(values[middle], values.T @ (weights * values))
        token_bytes = 2 * (head_dim * self.bits / 8 + METADATA_BYTES)
        native_bytes = 2 * PROTECTED * 2 * NATIVE_BYTES * head_dim
        return Stored(keys, values, (tokens - 2 * PROTECTED) * token_bytes + native_bytes)

    def _round(self, x: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
        """Quantize keys or values and back.

        Args:
            x: ``[tokens, head_dim]``.
            moments: ``[head_dim, head_dim]``, the matrix whose eigenvectors are the basis.
        """
        basis = torch.linalg.eigh(moments.double()).eigenvectors.flip(1).float()
        rotated = rotate(x @ basis)
        rounded = min(
            (_round_clipped(rotated, self.bits, clip) for clip in CLIPS),
            key=lambda candidate: _error(rotate(candidate - rotated) @ basis.T, moments),
        )
        return rotate(rounded) @ basis.T


def _round_clipped(x: torch.Tensor, bits: int, clip: float) -> torch.Tensor:
    top = (1 << bits) - 1
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    margin = (1 - clip) / 2 * (high - low)
    low = (low + margin).half().float()
    scale = ((high - margin - low) / top).clamp(min=6e-8).half().float()
    return ((x - low) / scale).round().clamp(0, top) * scale + low


def _error(error: torch.Tensor, moments: torch.Tensor) -> float:
    """Return the squared error of the products with vectors that have these second moments."""
    return float(((error @ moments) * error).sum())
