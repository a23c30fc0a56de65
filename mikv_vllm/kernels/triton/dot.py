"""Matrix products that are also correct in Triton's interpreter."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """Compute ``a @ b + acc`` with float32 sums. float32 operands are not rounded to tf32.

    The interpreter of Triton 3.9 reads the bits of bf16 operands as integers. There, operands are
    converted to float32, which does not change the products.
    """
    if INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot_signs(x, signs):
    """Compute ``x @ signs`` for float32 ``x`` and bf16 ``signs``.

    ``x`` is multiplied in three bf16 parts, which together have its 24 bits of precision.
    """
    out = tl.zeros([x.shape[0], signs.shape[1]], tl.float32)
    for _ in range(3):
        part = x.to(tl.bfloat16)
        out = dot(part, signs, out)
        x -= part.to(tl.float32)
    return out
