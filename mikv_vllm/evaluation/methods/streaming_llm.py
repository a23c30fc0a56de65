"""StreamingLLM: attention sinks and recent tokens."""

from dataclasses import dataclass

import torch

from mikv_vllm.evaluation.methods.base import HeadCache
from mikv_vllm.evaluation.methods.eviction import Eviction

SINKS = 4
"""First tokens of the prompt, which always stay."""


@dataclass(frozen=True)
class StreamingLLM(Eviction):
    """Keep the first 4 tokens and the most recent ones.

    Positions are not renumbered. Source: StreamingLLM (Xiao et al., 2023, arXiv:2309.17453).

    Args:
        ratio (float): compression ratio, above 1.
    """

    family = "recent only"

    def priority(self, cache: HeadCache, num_kept: int) -> torch.Tensor:
        priority = torch.arange(cache.num_tokens, dtype=torch.float32)
        priority[:SINKS] = torch.inf
        return priority
