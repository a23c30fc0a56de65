"""How the kernels that are launched are compiled."""

import inspect
from collections.abc import Callable

import triton

COUNTS = frozenset(
    {
        *("num_tokens", "num_high", "first_low", "recent"),
        *("num_queries", "num_chunks", "low_end", "order_stride", "score_stride"),
        *("num_restored", "num_leaving", "source", "to", "num_lines", "low_line"),
        "table_stride",
    }
)
"""Parameters that differ from request to request. Triton would compile a kernel again for those
that happen to be 1, or a multiple of 16."""
TABLES = frozenset({"native_table", "tiered_table", "starts"})
"""Pointers into a larger array, 16-byte aligned or not."""


def kernel(function: Callable) -> triton.JITFunction:
    """``triton.jit`` for a kernel that is launched: one compilation serves all requests."""
    names = inspect.signature(function).parameters
    return triton.jit(
        function,
        do_not_specialize=[name for name in names if name in COUNTS],
        do_not_specialize_on_alignment=[name for name in names if name in TABLES],
    )
