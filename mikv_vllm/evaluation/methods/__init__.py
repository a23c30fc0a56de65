"""Ways to store the KV cache of a prompt, to compare with: one method per file."""

from collections.abc import Callable, Sequence
from functools import partial

from mikv_vllm.evaluation.methods.balanced import Balanced
from mikv_vllm.evaluation.methods.base import CacheMethod, HeadCache, Stored
from mikv_vllm.evaluation.methods.block_gtq import BlockGTQ
from mikv_vllm.evaluation.methods.h2o import H2O
from mikv_vllm.evaluation.methods.kitty import Kitty
from mikv_vllm.evaluation.methods.kivi import KIVI
from mikv_vllm.evaluation.methods.mikv import DEFAULT_PAGE, MiKV
from mikv_vllm.evaluation.methods.mikv_paper import PaperMiKV
from mikv_vllm.evaluation.methods.nvfp4 import NVFP4
from mikv_vllm.evaluation.methods.oscar import OSCAR
from mikv_vllm.evaluation.methods.oscar_tokens import OScaR
from mikv_vllm.evaluation.methods.per_token import PerToken
from mikv_vllm.evaluation.methods.snapkv import SnapKV
from mikv_vllm.evaluation.methods.streaming_llm import StreamingLLM
from mikv_vllm.evaluation.methods.turboquant import TurboQuant
from mikv_vllm.tiers.formats import LowFormat

__all__ = [
    "BITS",
    "BY_BITS",
    "BY_RATIO",
    "FIXED",
    "H2O",
    "KIVI",
    "NVFP4",
    "OSCAR",
    "Balanced",
    "BlockGTQ",
    "CacheMethod",
    "HeadCache",
    "Kitty",
    "MiKV",
    "OScaR",
    "PaperMiKV",
    "PerToken",
    "SnapKV",
    "Stored",
    "StreamingLLM",
    "TurboQuant",
    "every_method",
]

BITS = (4, 3, 2)
"""Bits at which :func:`every_method` includes each method of :data:`BY_BITS`."""
BY_BITS: list[Callable[[int], CacheMethod]] = [
    PerToken,
    Balanced,
    KIVI,
    TurboQuant,
    OSCAR,
    OScaR,
    BlockGTQ,
    partial(PaperMiKV, high_bits=16),
    partial(PaperMiKV, high_bits=8),
]
"""Methods whose setting is a number of bits."""
FIXED: list[CacheMethod] = [NVFP4(), Kitty(1 / 4), Kitty(1 / 8)]
"""Methods with one setting, or a few."""
BY_RATIO: list[Callable[[float], CacheMethod]] = [StreamingLLM, H2O, SnapKV]
"""Methods whose setting is a compression ratio, besides :class:`MiKV`, which also has pages."""


def every_method(
    ratios: list[float],
    block_sizes: Sequence[int] = (DEFAULT_PAGE,),
    ladder: tuple[LowFormat, ...] | None = None,
) -> list[CacheMethod]:
    """List all methods in the order of the reports.

    Args:
        ratios: compression ratios at which each method that takes one is included.
        block_sizes: numbers of tokens of a native page, for :class:`MiKV`.
        ladder: low formats of :class:`MiKV`, richest first; None for those of the codec.
    """
    methods = FIXED + [method(bits) for bits in BITS for method in BY_BITS]
    for ratio in ratios:
        methods += [method(ratio) for method in BY_RATIO]
        for size in block_sizes:
            methods += [MiKV(ratio, size, ladder=ladder), MiKV(ratio, size, codec="balanced")]
    return methods
