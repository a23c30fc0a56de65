"""Compilation and launch of the kernels."""

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton
from triton.runtime import driver


def kernel(
    *,
    counts: tuple[str, ...] = (),
    tables: tuple[str, ...] = (),
    specialized: tuple[str, ...] = (),
    **options: int,
) -> Callable[[Callable], "Kernel"]:
    """Decorate a kernel function.

    Every integer argument must be declared, as a count or as specialized.

    Args:
        counts: integers that differ between requests. Triton does not compile the kernel again
            for the value 1 or for multiples of 16.
        tables: pointers into larger arrays. Triton does not compile the kernel again if they are
            not aligned to 16 bytes.
        specialized: integers that are constant for a model, such as strides. Triton compiles the
            kernel for the value 1 and for multiples of 16.
        options: launch options of Triton that differ from its defaults, such as ``num_warps``.
    """
    return lambda function: Kernel(function, counts, tables, specialized, options)


class Kernel:
    """A kernel with lower launch overhead than ``triton.jit``.

    Triton's launch inspects each argument, constant, option and global variable, and builds a
    string of them to find the compiled code. This class looks the compiled code up by a tuple of
    everything that the compilation depends on. It is the result of the decorator :func:`kernel`.

    Attributes:
        jit: the Triton function.
        names: names of the arguments, which are passed by position.
        constants: names of the compile-time arguments, which are passed by name.
        options: launch options.
    """

    def __init__(
        self,
        function: Callable,
        counts: tuple[str, ...],
        tables: tuple[str, ...],
        specialized: tuple[str, ...],
        options: dict[str, int],
    ) -> None:
        parameters = inspect.signature(function).parameters
        self.constants = [n for n, p in parameters.items() if "constexpr" in str(p.annotation)]
        self.names = [name for name in parameters if name not in self.constants]
        assert self.names + self.constants == list(parameters), "constants come last"
        declared = [*counts, *tables, *specialized]
        assert len(set(declared)) == len(declared), "an argument is declared twice"
        assert set(declared) <= set(self.names), "a declared argument does not exist"
        self.counts, self.tables, self.options = frozenset(counts), frozenset(tables), options
        self.integers = frozenset(counts) | frozenset(specialized)
        self.jit = triton.jit(
            function, do_not_specialize=counts, do_not_specialize_on_alignment=tables
        )
        self._alike = [name in self.counts | self.tables for name in self.names]
        self._compiled: dict[Hashable, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """``kernel[grid](*arguments, **constants_and_options)`` launches, as in Triton."""

        def launch(*args: Any, **constants: Any) -> Any:
            if not isinstance(self.jit, triton.JITFunction):
                return self._first_launch(grid, args, constants)  # interpreted
            key = (*map(_trait, args, self._alike), *constants.items())
            key = (driver.active.get_current_device(), *key)
            compiled = self._compiled.get(key)
            if compiled is None:
                compiled = self._compiled[key] = self._first_launch(grid, args, constants)
            else:
                values = [constants[name] for name in self.constants]
                compiled[(*grid, 1, 1)[:3]](*args, *values)
            return compiled

        return launch

    def _first_launch(
        self, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
    ) -> Any:
        """Launch through Triton, which compiles or interprets the kernel."""
        for name, arg in zip(self.names, args, strict=True):
            assert (type(arg) is int) == (name in self.integers), (
                f"argument {name} of {self.jit.__name__} is {arg!r}, but integers, and only"
                " integers, must be declared as counts or as specialized"
            )
        return self.jit[grid](*args, **self.options | constants)


def _trait(arg: Any, alike: bool) -> Hashable:
    """Return what a compilation depends on, as Triton's ``native_specialize_impl`` does.

    Args:
        alike: the compilation does not depend on the value of a number, nor on the alignment of a
            pointer.
    """
    if isinstance(arg, torch.Tensor):
        return arg.dtype, alike or not arg.data_ptr() & 15
    if type(arg) is int:
        wide = arg.bit_length() > 31
        return wide if alike else (wide, arg == 1, not arg & 15)
    assert arg is None or type(arg) is float, f"{arg!r} is neither a tensor nor a number"
    return type(arg).__name__
