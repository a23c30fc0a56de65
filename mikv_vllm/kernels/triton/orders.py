"""Orders in which :mod:`~mikv_vllm.kernels.triton.unpack` returns tokens and channels.

A thread of a tensor core then owns the words that it loads. No data moves between threads.
"""

import triton
import triton.language as tl


@triton.jit
def token_order():
    """Token of each row of a block of 32 tokens, in the order of :func:`~unpack.low_keys`."""
    row = tl.arange(0, 32)
    return row // 16 * 16 + row % 8 * 2 + row // 8 % 2


@triton.jit
def channel_order(PADDED: tl.constexpr):
    """Rank of each column of :func:`~unpack.low_keys`, or channel of :func:`~unpack.high_keys`."""
    column = tl.arange(0, PADDED)
    return column // 16 * 16 + column // 2 % 4 * 4 + column % 2 * 2 + column // 8 % 2


@triton.jit
def value_channel_order(PADDED: tl.constexpr):
    """Channel of each row of :func:`~unpack.low_values` or :func:`~unpack.high_values`."""
    row = tl.arange(0, PADDED)
    return row // 16 * 16 + row % 8 * 2 + row // 8 % 2
