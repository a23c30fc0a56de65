"""Where native keys and values lie: vLLM's pages, any strides, channels contiguous."""

from typing import NamedTuple

import triton
import triton.language as tl


class NativePages(NamedTuple):
    """A native request's pages, for device functions. Strides count elements."""

    page_stride: object
    token_stride: object
    table: object
    """int32 pointer to page ids."""


@triton.jit
def load_native(data, native, tokens, channel, mask, LAYER: tl.constexpr):
    """Keys or values of ``tokens [n]`` at ``channel [c]``: ``[n, c]``, 0 where ``mask [n]`` is not.

    Args:
        data: pointer to the head's keys or values.
    """
    page = tl.load(native.table + tokens // LAYER.block_size).to(tl.int64)
    token = page * native.page_stride + tokens % LAYER.block_size * native.token_stride
    inside = mask[:, None] & (channel < LAYER.head_dim)[None, :]
    return tl.load(data + token[:, None] + channel[None, :], mask=inside, other=0.0)


@triton.jit
def store_native(data, strides, tokens, channel, numbers, mask, LAYER: tl.constexpr):
    """Store keys or values ``[n, c]`` as ``tokens [n]`` of pages 0, 1, … at ``channel [c]``.

    Channels from ``head_dim`` on are not stored.

    Args:
        data: pointer to the head's keys or values.
        strides: from a page and from a token to the next, in elements.
    """
    page = (tokens // LAYER.block_size).to(tl.int64)
    at = page * strides[0] + tokens % LAYER.block_size * strides[1]
    inside = mask[:, None] & (channel < LAYER.head_dim)[None, :]
    numbers = numbers.to(data.dtype.element_ty)
    tl.store(data + at[:, None] + channel[None, :], numbers, mask=inside)
