"""Parameters of one attention layer, in the form that launches need."""

import torch
import triton.language as tl

from mikv_vllm.kernels.layer_ops import check_shape
from mikv_vllm.kernels.triton.layout import Layout, next_power_of_two
from mikv_vllm.kernels.triton.scratch import Scratch
from mikv_vllm.kernels.triton.splits import programs_on
from mikv_vllm.tiers import codec

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
HEAD_DIMS: tuple[int, ...] = (64, 80, 96, 112, 128, 256)
"""Supported head sizes. Padded to a power of two, their value groups are powers of two."""


class LayerSetup:
    """Base class of the operations; see :class:`~mikv_vllm.kernels.triton.layer.LayerOps`."""

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        block_size: int,
        high_bits: int,
        scale: float,
        softcap: float,
        sinks: torch.Tensor | None,
        decay: float,
        recent: int,
        scratch: Scratch,
        programs: int | None = None,
    ) -> None:
        check_shape(head_dim, HEAD_DIMS, num_heads, num_kv_heads, block_size)
        self.head_dim = head_dim
        self._layout = Layout(head_dim, num_heads // num_kv_heads, block_size, high_bits)
        self.geometry = self._layout.geometry
        self.num_kv_heads = num_kv_heads
        self._scale = scale
        self._softcap = float(softcap or 0.0)
        self._sinks = None if sinks is None else sinks.float().contiguous()
        self._decay = decay
        self._recent = recent
        self._scratch = scratch
        self._programs = programs or programs_on(scratch.device)
        self._hadamard = hadamard_signs(head_dim).to(scratch.device)
        self._hadamard_scale = codec.hadamard_size(head_dim) ** -0.5

    def _native(self, cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values of native pages, ``[pages, block_size, kv_heads, head_dim]`` each.

        Args:
            cache: ``[pages, kv_heads, block_size, 2 * head_dim]``.
        """
        return cache.transpose(1, 2).split(self._layout.head_dim, dim=-1)


def hadamard_signs(head_dim: int) -> torch.Tensor:
    """Signs of the block rotation, bf16 ``[padded, padded]``, 0 from ``head_dim`` on."""
    size = codec.hadamard_size(head_dim)
    padded = next_power_of_two(head_dim)
    signs = torch.zeros(padded, padded, dtype=torch.bfloat16)
    block = codec.rotate(torch.eye(size)).sign()
    for start in range(0, head_dim, size):
        signs[start : start + size, start : start + size] = block
    return signs


def words(cache: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """A cache as int32 words, and its page and head strides in words."""
    scale = 4 // cache.element_size() if cache.element_size() < 4 else 1
    assert not cache.stride(0) % scale, "page stride is not a multiple of a word"
    assert not cache.stride(1) % scale, "head stride is not a multiple of a word"
    return cache.view(torch.int32), cache.stride(0) // scale, cache.stride(1) // scale
