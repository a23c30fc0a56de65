"""What eviction methods share: some tokens stay at 16 bits, the others are dropped."""

from abc import abstractmethod
from dataclasses import dataclass

import torch

from mikv_vllm.evaluation.methods.base import CacheMethod, HeadCache, Stored


@dataclass(frozen=True)
class Eviction(CacheMethod):
    """Keep as many tokens as fit ``1 / ratio`` of the native bytes.

    Args:
        ratio (float): compression ratio, above 1.
    """

    ratio: float

    @property
    def setting(self) -> str:
        return f"ratio {self.ratio:g}"

    @abstractmethod
    def priority(self, cache: HeadCache, num_kept: int) -> torch.Tensor:
        """Rank the tokens: the ``num_kept`` tokens with the largest numbers stay.

        Returns:
            float32 ``[tokens]``, a new tensor.
        """

    def store(self, cache: HeadCache) -> Stored:
        num_kept = max(1, int(cache.num_tokens / self.ratio))
        kept = self.priority(cache, num_kept).topk(num_kept).indices.sort().values
        share = num_kept / cache.num_tokens
        return Stored(cache.keys[kept], cache.values[kept], share * cache.native_bytes)
