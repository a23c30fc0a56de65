"""What every method of storing a prompt's keys and values has in common."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

NATIVE_BYTES = 2


@dataclass(frozen=True)
class HeadCache:
    """One layer's and KV head's cache after a prompt, float32, and what is known of its use.

    Args:
        keys, values: ``[tokens, head_dim]``, positions rotated into the keys.
        queries: ``[group * window, head_dim]``, of the prompt's last tokens.
        largest_query: ``[head_dim]``, largest magnitude of each channel over all queries.
        attention: ``[tokens]``, weights that the prompt's queries paid to each token, summed.
        window_attention: the same of the last ``window`` queries.
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    largest_query: torch.Tensor
    attention: torch.Tensor
    window_attention: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.keys)

    @property
    def head_dim(self) -> int:
        return self.keys.shape[1]

    @property
    def native_bytes(self) -> int:
        """Bytes of 16-bit keys and values."""
        return 2 * NATIVE_BYTES * self.num_tokens * self.head_dim


@dataclass(frozen=True)
class Stored:
    """What a method keeps: keys and values ``[kept tokens, head_dim]`` as attention gets them back.

    ``num_bytes`` counts everything that has to be stored, metadata included.
    """

    keys: torch.Tensor
    values: torch.Tensor
    num_bytes: float


class CacheMethod(ABC):
    """A way to store the cache of a prompt, head by head."""

    family: str
    """Name of the method, the same for all its settings."""

    @property
    @abstractmethod
    def setting(self) -> str:
        """What distinguishes it from others of the family."""

    @abstractmethod
    def store(self, cache: HeadCache) -> Stored:
        """Store one head's cache. All heads keep the same number of tokens."""


def quantize(x: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Asymmetric round-to-nearest along ``axis`` with fp16 scale and offset, and back."""
    top = (1 << bits) - 1
    low = x.amin(axis, keepdim=True)
    scale = ((x.amax(axis, keepdim=True) - low) / top).clamp(min=6e-8).half().float()
    low = low.half().float()
    return ((x - low) / scale).round().clamp(0, top) * scale + low


def by_groups(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Quantize ``[tokens, head_dim]`` per token; ``group`` channels share a scale and offset."""
    size = min(group, x.shape[1])
    return quantize(x.unflatten(1, (-1, size)), bits, -1).flatten(1)
