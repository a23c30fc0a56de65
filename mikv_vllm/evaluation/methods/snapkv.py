"""SnapKV: the tokens that the end of the prompt attends to."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mikv_vllm.evaluation.methods.base import HeadCache
from mikv_vllm.evaluation.methods.eviction import Eviction

WINDOW = 32
"""Last tokens of the prompt, which always stay."""
POOL_TOKENS = 7
"""Neighbouring tokens over which attention is pooled."""


@dataclass(frozen=True)
class SnapKV(Eviction):
    """Keep the last 32 tokens, and the tokens that received the most attention from their queries.

    Attention is max-pooled over 7 neighbouring tokens. The number of queries is the window of the
    :class:`HeadCache`. Source: SnapKV (Li et al., 2024, arXiv:2404.14469).

    Args:
        ratio (float): compression ratio, above 1.
    """

    family = "SnapKV"

    def priority(self, cache: HeadCache, num_kept: int) -> torch.Tensor:
        scores = cache.window_attention[None, None]
        priority = F.max_pool1d(scores, POOL_TOKENS, stride=1, padding=POOL_TOKENS // 2)[0, 0]
        priority[-min(WINDOW, num_kept) :] = torch.inf
        return priority
