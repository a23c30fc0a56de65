"""Where native keys and values lie: vLLM's pages, any strides, channels contiguous."""

from typing import NamedTuple

import triton
import triton.language as tl


class NativePages(NamedTuple):
    """One head of a native request, for device functions. Strides count elements."""

    key_data: object
    value_data: object
    page_stride: object
    token_stride: object
    table: object
    """int32 pointer to page ids."""


@triton.jit
def native_offset(native, tokens, L: tl.constexpr):
    """Element offset of each token in keys and in values."""
    page = tl.load(native.table + tokens // L.block_size).to(tl.int64)
    return page * native.page_stride + tokens % L.block_size * native.token_stride


@triton.jit
def load_native(native, tokens, channel, mask, L: tl.constexpr):
    """Keys of ``tokens [n]`` at ``channel [c]``, ``[n, c]``, 0 where ``mask [n]`` is not set."""
    at = native.key_data + native_offset(native, tokens, L)[:, None] + channel[None, :]
    inside = mask[:, None] & (channel < L.head_dim)[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def load_native_values(native, tokens, channel, mask, L: tl.constexpr):
    """The same of values."""
    at = native.value_data + native_offset(native, tokens, L)[:, None] + channel[None, :]
    inside = mask[:, None] & (channel < L.head_dim)[None, :]
    return tl.load(at, mask=inside, other=0.0)
