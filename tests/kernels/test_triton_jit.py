"""Kernels declare how Triton specializes their arguments."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl

from mikv_vllm.kernels.triton.jit import kernel


def add(out, stride, num_tokens, scale, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at * stride, num_tokens * scale, mask=at < num_tokens)


def test_arguments_and_constants_reach_the_kernel(device):
    out = torch.zeros(8, device=device)
    fill = kernel(counts=("num_tokens",), specialized=("stride",), num_warps=1)(add)
    fill[1,](out, 2, 3, 0.5, SIZE=4)
    assert out.tolist() == [1.5, 0, 1.5, 0, 1.5, 0, 0, 0]


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"counts": ("num_tokens",)}, "argument stride of add is 2, but integers"),
        ({"specialized": ("stride", "num_tokens", "scale")}, "argument scale of add is 0.5"),
    ],
)
def test_a_launch_refuses_integers_that_are_not_declared(declared, message, device):
    undeclared = kernel(**declared)(add)
    with pytest.raises(AssertionError, match=message):
        undeclared[1,](torch.zeros(8, device=device), 2, 3, 0.5, SIZE=4)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"counts": ("stride",), "specialized": ("stride",)}, "an argument is declared twice"),
        ({"tables": ("table",)}, "a declared argument does not exist"),
        ({"counts": ("SIZE",)}, "a declared argument does not exist"),
    ],
)
def test_declarations_that_make_no_sense(declared, message):
    with pytest.raises(AssertionError, match=message):
        kernel(**declared)(add)
