"""Block-GTQ: TurboQuant with more bits for pairs of key channels with more energy."""

from dataclasses import dataclass
from functools import cache as cached

import torch

from mikv_vllm.evaluation.methods.base import CacheMethod, HeadCache, Stored
from mikv_vllm.evaluation.methods.turboquant import round_normal, round_rotated
from mikv_vllm.tiers.formats import NATIVE_BYTES

MOST_BITS = 8


@dataclass(frozen=True)
class BlockGTQ(CacheMethod):
    """Allocate the bits of a key to pairs of channels that RoPE rotates together.

    The energy of a pair is the product of the mean squares of the queries and of the keys. One bit
    at a time goes to the pair whose error decreases most, if a bit quarters it. All pairs with the
    same bits are rotated together, with a norm in fp16. Values are those of
    :class:`~mikv_vllm.evaluation.methods.turboquant.TurboQuant`. The paper computes energies once
    for a model. Here they are those of each prompt, which favours the method. Source: Block-GTQ
    (Liang et al., 2026, arXiv:2606.24033).

    Args:
        bits (int): mean bits of a key channel, and bits of a value channel.
    """

    bits: int
    family = "Block-GTQ"

    @property
    def setting(self) -> str:
        return f"{self.bits} bits"

    def store(self, cache: HeadCache) -> Stored:
        tokens, head_dim = cache.keys.shape
        energy = cache.keys.square().mean(0) * cache.queries.square().mean(0)
        widths = allocate(energy.unflatten(0, (2, -1)).sum(0), self.bits).repeat(2)
        keys = torch.zeros_like(cache.keys)
        classes = widths.unique().tolist()
        for width in classes:
            channels = (widths == width).nonzero().squeeze(1)
            if width:
                mixing = _orthogonal(len(channels))
                keys[:, channels] = round_normal(cache.keys[:, channels] @ mixing, width) @ mixing.T
        norms = sum(width > 0 for width in classes)
        key_bytes = head_dim * self.bits / 8 + NATIVE_BYTES * norms
        value_bytes = head_dim * self.bits / 8 + NATIVE_BYTES
        values = round_rotated(cache.values, self.bits)
        return Stored(keys, values, tokens * (key_bytes + value_bytes) + head_dim / 2)


def allocate(energy: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the bits of each pair of channels, int64 ``[pairs]``, with the given mean."""
    widths = torch.zeros(len(energy), dtype=torch.long)
    left = energy.double().clone()
    for _ in range(bits * len(energy)):
        pair = int(left.argmax())
        widths[pair] += 1
        left[pair] = left[pair] / 4 if widths[pair] < MOST_BITS else -1.0
    return widths


@cached
def _orthogonal(size: int) -> torch.Tensor:
    """Return a random orthonormal matrix, the same one for the same size."""
    normal = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    return torch.linalg.qr(normal).Q
