"""How the kernels that are launched are compiled, and found again at the next launch."""

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton
from triton.runtime import driver

COUNTS = frozenset(
    {
        *("num_tokens", "num_high", "first_low", "recent"),
        *("num_queries", "num_low_records", "low_end_line", "order_stride", "score_stride"),
        *("num_restored", "num_leaving", "source", "to", "num_lines", "low_line"),
        "table_stride",
    }
)
"""Parameters that differ from request to request. Triton would compile a kernel again for those
that happen to be 1, or a multiple of 16."""
TABLES = frozenset({"native_table", "tiered_table", "starts"})
"""Pointers into a larger array, 16-byte aligned or not."""


class Kernel:
    """Decorates a function that is launched: ``triton.jit`` with less ado.

    At every launch Triton looks at each argument, constant, option and global variable, and makes
    a string of them. Here a tuple of what a compilation depends on is looked up. Arguments go by
    position, constants and options by name.
    """

    def __init__(self, function: Callable) -> None:
        parameters = inspect.signature(function).parameters
        self.constants = [n for n, p in parameters.items() if "constexpr" in str(p.annotation)]
        self.names = [name for name in parameters if name not in self.constants]
        assert self.names + self.constants == list(parameters), "constants come last"
        self.jit = triton.jit(
            function,
            do_not_specialize=[name for name in parameters if name in COUNTS],
            do_not_specialize_on_alignment=[name for name in parameters if name in TABLES],
        )
        self._alike = [name in COUNTS | TABLES for name in self.names]
        self._compiled: dict[Hashable, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """``kernel[grid](*arguments, **constants_and_options)`` launches, as in Triton."""

        def launch(*args: Any, **constants: Any) -> Any:
            if not isinstance(self.jit, triton.JITFunction):
                return self.jit[grid](*args, **constants)  # interpreted
            key = (*map(_trait, args, self._alike), *constants.items())
            key = (driver.active.get_current_device(), *key)
            compiled = self._compiled.get(key)
            if compiled is None:
                compiled = self._compiled[key] = self.jit[grid](*args, **constants)
            else:
                values = [constants[name] for name in self.constants]
                compiled[(*grid, 1, 1)[:3]](*args, *values)
            return compiled

        return launch


def _trait(arg: Any, alike: bool) -> Hashable:
    """What Triton compiles for: see its ``native_specialize_impl``.

    Args:
        alike: it is not compiled for a value or an address.
    """
    if isinstance(arg, torch.Tensor):
        return arg.dtype, alike or not arg.data_ptr() & 15
    if type(arg) is int:
        wide = arg.bit_length() > 31
        return wide if alike else (wide, arg == 1, not arg & 15)
    assert arg is None or type(arg) is float, f"{arg!r} is neither a tensor nor a number"
    return type(arg).__name__
