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
        self._taken: dict[str, tuple[tuple[int, ...], torch.dtype, torch.Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        """All that it has grown to."""
        return sum(map(len, self._memory.values()))

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialized memory; the next call with this name gets the same."""
        if name in self._taken:
            last_shape, last_dtype, view = self._taken[name]
            if last_shape == shape and last_dtype == dtype:
                return view
        size = math.prod(shape) * dtype.itemsize
        memory = self._memory.get(name)
        if memory is None or len(memory) < size:
            memory = self._memory[name] = torch.empty(size, dtype=torch.uint8, device=self.device)
        view = memory[:size].view(dtype).view(shape)
        self._taken[name] = shape, dtype, view
        return view
