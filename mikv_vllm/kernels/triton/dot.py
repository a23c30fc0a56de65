"""Matrix products that also hold in Triton's interpreter."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """``a @ b + acc`` with float32 sums; float32 operands are multiplied as such, not as tf32.

    Triton 3.9's interpreter would take bf16's bits for integers: there, operands are widened, which
    changes no product.
    """
    if INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot_signs(x, signs):
    """``x @ signs`` of float32 ``x`` and bf16 signs: three bf16 parts keep 24 bits of every x."""
    out = tl.zeros([x.shape[0], signs.shape[1]], tl.float32)
    for _ in range(3):
        part = x.to(tl.bfloat16)
        out = dot(part, signs, out)
        x -= part.to(tl.float32)
    return out
