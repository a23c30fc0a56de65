"""Ways to store a prompt's keys and values, for comparison: one family a file."""

from mikv_vllm.evaluation.methods.base import CacheMethod, HeadCache, Stored
from mikv_vllm.evaluation.methods.eviction import HeavyHitters, Recent, SnapKV
from mikv_vllm.evaluation.methods.two_tier import MiKV, PaperMiKV
from mikv_vllm.evaluation.methods.uniform import (
    Balanced,
    PerChannelKeys,
    PerToken,
    RotatedLloydMax,
)

__all__ = [
    "Balanced",
    "CacheMethod",
    "HeadCache",
    "HeavyHitters",
    "MiKV",
    "PaperMiKV",
    "PerChannelKeys",
    "PerToken",
    "Recent",
    "RotatedLloydMax",
    "SnapKV",
    "Stored",
    "every_method",
]


def every_method(ratios: list[float], block_size: int = 32) -> list[CacheMethod]:
    """All methods, those with a ratio at each of ``ratios``."""
    methods: list[CacheMethod] = []
    for bits in (4, 3, 2):
        methods += [PerToken(bits), Balanced(bits), PerChannelKeys(bits), RotatedLloydMax(bits)]
        methods += [PaperMiKV(bits, 16), PaperMiKV(bits, 8)]
    for ratio in ratios:
        methods += [Recent(ratio), HeavyHitters(ratio), SnapKV(ratio)]
        methods += [MiKV(ratio, block_size), MiKV(ratio, block_size, codec="balanced")]
    return methods
