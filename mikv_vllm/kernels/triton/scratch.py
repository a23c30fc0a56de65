"""Temporary device memory of kernel launches, shared by the layers of a model."""

import math

import torch


class Scratch:
    """One buffer per name. A buffer grows to the largest size that was requested.

    Layers run one after the other, so they can share the buffers.

    A captured CUDA graph keeps the addresses of the buffers. Run the largest batch before the
    capture.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._memory: dict[str, torch.Tensor] = {}
        self._taken: dict[str, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Size of all buffers."""
        return sum(map(len, self._memory.values()))

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return uninitialized memory, valid until the next call with this name."""
        last = self._taken.get(name)
        if last is not None and last.shape == shape and last.dtype == dtype:
            return last
        size = math.prod(shape) * dtype.itemsize
        memory = self._memory.get(name)
        if memory is None or len(memory) < size:
            memory = self._memory[name] = torch.empty(size, dtype=torch.uint8, device=self.device)
        taken = self._taken[name] = memory[:size].view(dtype).view(shape)
        return taken
