"""Loading and storing of keys and values in native pages, with any strides.

Channels are contiguous.
"""

from typing import NamedTuple

import triton
import triton.language as tl

PARTS = 32
"""Parts into which the tokens of a prompt are divided, one per program."""

NATIVE_STRIDES = ("native_page_stride", "native_token_stride", "native_head_stride")
"""Arguments of kernels: strides of native keys and of native values, in elements."""


class NativePages(NamedTuple):
    """The native pages of a request, for device functions. Strides are in elements."""

    page_stride: object
    token_stride: object
    table: object
    """int32 pointer to page ids."""


@triton.jit
def load_native(data, native, tokens, channel, mask, LAYER: tl.constexpr):
    """Load keys or values of ``tokens [n]`` at ``channel [c]``: ``[n, c]``, 0 where masked.

    Args:
        data: pointer to the keys or values of the KV head.
        mask: which tokens to load, ``[n]``.
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
        data: pointer to the keys or values of the KV head.
        strides: elements per page and per token.
    """
    page = (tokens // LAYER.block_size).to(tl.int64)
    at = page * strides[0] + tokens % LAYER.block_size * strides[1]
    inside = mask[:, None] & (channel < LAYER.head_dim)[None, :]
    numbers = numbers.to(data.dtype.element_ty)
    tl.store(data + at[:, None] + channel[None, :], numbers, mask=inside)
