"""Some tokens at 16 bits, the others dropped."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mikv_vllm.evaluation.methods.base import CacheMethod, HeadCache, Stored

SINKS = 4
WINDOW = 32
POOL = 7


@dataclass(frozen=True)
class Eviction(CacheMethod):
    """Keeps as many tokens as fit ``1 / ratio`` of the bytes."""

    ratio: float

    @property
    def setting(self) -> str:
        return f"ratio {self.ratio:g}"

    @abstractmethod
    def priority(self, cache: HeadCache, kept: int) -> torch.Tensor:
        """The ``kept`` tokens with the largest numbers stay, ``[tokens]``."""

    def store(self, cache: HeadCache) -> Stored:
        kept = max(1, int(cache.num_tokens / self.ratio))
        chosen = self.priority(cache, kept).topk(kept).indices.sort().values
        share = kept / cache.num_tokens
        return Stored(cache.keys[chosen], cache.values[chosen], share * cache.native_bytes)


def ascending(cache: HeadCache) -> torch.Tensor:
    return torch.arange(cache.num_tokens, dtype=torch.float32)


@dataclass(frozen=True)
class Recent(Eviction):
    """The first 4 tokens and the most recent ones. Source: StreamingLLM (Xiao et al., 2023)."""

    family = "recent only"

    def priority(self, cache: HeadCache, kept: int) -> torch.Tensor:
        priority = ascending(cache)
        priority[:SINKS] = torch.inf
        return priority


@dataclass(frozen=True)
class HeavyHitters(Eviction):
    """Half recent tokens, half those with the most attention. Source: H2O (Zhang et al., 2023)."""

    family = "H2O"

    def priority(self, cache: HeadCache, kept: int) -> torch.Tensor:
        priority = cache.attention.clone()
        priority[cache.num_tokens - kept // 2 :] = torch.inf
        return priority


@dataclass(frozen=True)
class SnapKV(Eviction):
    """The last 32 tokens, and those that they attend to, pooled over 7 neighbours.

    Source: SnapKV (Li et al., 2024).
    """

    family = "SnapKV"

    def priority(self, cache: HeadCache, kept: int) -> torch.Tensor:
        scores = cache.window_attention[None, None]
        priority = F.max_pool1d(scores, POOL, stride=1, padding=POOL // 2)[0, 0]
        priority[-min(WINDOW, kept) :] = torch.inf
        return priority
