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
        self._taken: dict[str, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """All that it has grown to."""
        return sum(map(len, self._memory.values()))

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialized memory; the next call with this name gets the same."""
        last = self._taken.get(name)
        if last is not None and last.shape == shape and last.dtype == dtype:
            return last
        size = math.prod(shape) * dtype.itemsize
        memory = self._memory.get(name)
        if memory is None or len(memory) < size:
            memory = self._memory[name] = torch.empty(size, dtype=torch.uint8, device=self.device)
        taken = self._taken[name] = memory[:size].view(dtype).view(shape)
        return taken
