"""The interface of all methods: :class:`HeadCache` in, :class:`Stored` out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from mikv_vllm.tiers.formats import NATIVE_BYTES


@dataclass(frozen=True)
class HeadCache:
    """The KV cache of a prompt in one layer and KV head, and how the prompt used it. All float32.

    Methods must not modify the tensors.

    Args:
        keys: ``[tokens, head_dim]``, with positions rotated into them.
        values: ``[tokens, head_dim]``.
        queries: ``[queries_per_kv_head * window, head_dim]``, the last ``window`` queries of the
            prompt, of all query heads that share the KV head.
        largest_query: ``[head_dim]``, largest magnitude of each channel over all queries.
        window_attention: ``[tokens]``, attention weight that each token received, summed over the
            last ``window`` queries.
        attention: ``[tokens]``, the same sum over all queries, if a method of the run reads it
            (:attr:`CacheMethod.reads_attention`).
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    largest_query: torch.Tensor
    window_attention: torch.Tensor
    attention: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.keys)

    @property
    def head_dim(self) -> int:
        return self.keys.shape[1]

    def part(self, first: int, end: int) -> Self:
        """The cache of some of the tokens; the queries are those of the whole prompt."""
        return replace(
            self,
            keys=self.keys[first:end],
            values=self.values[first:end],
            window_attention=self.window_attention[first:end],
            attention=None if self.attention is None else self.attention[first:end],
        )

    @property
    def native_bytes(self) -> int:
        """Bytes of the keys and values at 16 bits."""
        return 2 * NATIVE_BYTES * self.num_tokens * self.head_dim


@dataclass(frozen=True)
class Stored:
    """What a method stored for one layer and KV head.

    Args:
        keys: ``[kept_tokens, head_dim]``, float32, as attention reads them back.
        values: ``[kept_tokens, head_dim]``, float32, in the order of ``keys``.
        num_bytes: bytes of everything that has to be stored, metadata included.
    """

    keys: torch.Tensor
    values: torch.Tensor
    num_bytes: float


class CacheMethod(ABC):
    """A way to store the KV cache of a prompt, one layer and KV head at a time."""

    family: str
    """Name of the method, the same for all its settings. Reports show it."""
    reads_attention: ClassVar[bool] = False
    """Whether it needs :attr:`HeadCache.attention`, which takes most of the time of a prompt."""

    @property
    @abstractmethod
    def setting(self) -> str:
        """What distinguishes this object from others of the same family. Reports show it."""

    @abstractmethod
    def store(self, cache: HeadCache) -> Stored:
        """Store the cache of one head, and read it back.

        The number of kept tokens depends on the number of tokens only, so that it is the same in
        all heads of a layer.
        """
