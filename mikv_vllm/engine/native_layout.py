"""Order of the numbers in a native page of vLLM's CPU kernels, found by writing to a page."""

from dataclasses import dataclass
from functools import cache

import torch
from vllm import _custom_ops as ops


@dataclass(frozen=True)
class NativeLayout:
    """Index of each number in the part of a page that belongs to a head.

    ``key_index`` and ``value_index`` are int32 ``[block_size * head_dim]``. Entry
    ``t * head_dim + c`` is the index of channel ``c`` of token ``t``, in numbers of the cache's
    dtype.
    """

    key_index: torch.Tensor
    value_index: torch.Tensor


@cache
def native_layout(isa: str, block_size: int, head_dim: int, dtype: torch.dtype) -> NativeLayout:
    """Write consecutive numbers with vLLM's operation, and read their order in the page."""
    numbers = torch.arange(block_size * head_dim)
    place = torch.zeros(2, 2 * block_size * head_dim, dtype=torch.long)
    # bf16 represents integers up to 256 exactly, so each number is written as two bytes. Keys and
    # values are written separately; the other part of the page stays -1.
    for which in range(2):
        parts = []
        for byte in (numbers & 255, numbers >> 8):
            cache_page = torch.full((1, 1, 2 * block_size, head_dim), -1.0, dtype=dtype)
            key_cache, value_cache = cache_page.chunk(2, dim=2)
            ramp = byte.to(dtype).reshape(block_size, 1, head_dim)
            blank = torch.full_like(ramp, -1.0)
            key, value = (ramp, blank) if which == 0 else (blank, ramp)
            ops.cpu_attn_reshape_and_cache(
                key, value, key_cache, value_cache, torch.arange(block_size), isa
            )
            parts.append(cache_page.flatten().long())
        place[which] = torch.where(parts[0] < 0, -1, parts[0] + 256 * parts[1])
    index = torch.empty(2, block_size * head_dim, dtype=torch.int32)
    for which in range(2):
        where = (place[which] >= 0).nonzero().flatten()
        assert len(where) == len(numbers), (
            f"vLLM's native page for isa {isa!r} is not a permutation"
        )
        index[which, place[which][where]] = where.to(torch.int32)
    return NativeLayout(index[0].contiguous(), index[1].contiguous())
