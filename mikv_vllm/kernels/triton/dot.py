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
