"""H2O: heavy hitters and recent tokens."""

from dataclasses import dataclass

import torch

from mikv_vllm.evaluation.methods.base import HeadCache
from mikv_vllm.evaluation.methods.eviction import Eviction


@dataclass(frozen=True)
class H2O(Eviction):
    """Keep recent tokens, and as many tokens that received the most attention from all queries.

    Tokens are dropped once, after the prompt. Source: H2O (Zhang et al., 2023, arXiv:2306.14048).

    Args:
        ratio (float): compression ratio, above 1.
    """

    family = "H2O"
    reads_attention = True

    def priority(self, cache: HeadCache, num_kept: int) -> torch.Tensor:
        assert cache.attention is not None
        priority = cache.attention.clone()
        priority[cache.num_tokens - num_kept // 2 :] = torch.inf
        return priority
