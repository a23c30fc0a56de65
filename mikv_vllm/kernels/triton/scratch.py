"""Device memory that the layers of a model share, since one runs after the other."""

import math

import torch


class Scratch:
    """Grows to the largest request for each name.

    A captured CUDA graph keeps addresses: capture after a run with the largest batch.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._memory: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialized memory; the next layer's call gets the same."""
        size = math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or len(memory) < size:
            memory = self._memory[name] = torch.empty(size, dtype=dtype, device=self.device)
        return memory[:size].view(shape)
