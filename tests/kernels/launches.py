"""Launches of one kernel with arguments that Triton specializes, and arguments that it does not.

    python -m tests.kernels.launches

Runs in its own process, because it uses the compiler and not the interpreter. Fails if a launch
uses another compiled binary than Triton's own launch.
"""

from itertools import product

import torch
import triton
import triton.language as tl

from benchmarks.gpu.launches import Driver
from mikv_vllm.kernels.triton.jit import kernel


@kernel(counts=("num_tokens",), tables=("starts",), specialized=("stride",))
def fill_kernel(out, starts, num_tokens, stride, scale, bias, SIZE: tl.constexpr):
    at = tl.program_id(0) * stride + tl.arange(0, SIZE)
    value = tl.load(starts) * scale + num_tokens
    if bias is not None:
        value += tl.load(bias)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < num_tokens)


def main() -> None:
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    memory = torch.zeros(64, dtype=torch.int32)
    outs = (memory, memory[1:], memory.float())
    numbers = (1, 16, 17, 1 << 33)
    cases = list(product(outs, (memory, memory[1:]), numbers, numbers, (None, memory), (16, 32)))
    for again in range(2):
        for out, starts, num_tokens, stride, bias, size in cases:
            args = (out, starts, num_tokens, stride, 0.5, bias)
            for options in ({}, {"num_warps": 8}):
                found = fill_kernel[2,](*args, SIZE=size, **options)
                expected = fill_kernel.jit[2,](*args, SIZE=size, **options)
                assert found is expected, (again, *args, size, options)
    # Counts and tables are not specialized, except for the width of counts.
    assert driver.loaded["fill_kernel"] == len(outs) * 2 * len(numbers) * 2 * 2 * 2
    print(driver.loaded["fill_kernel"])


if __name__ == "__main__":
    main()
