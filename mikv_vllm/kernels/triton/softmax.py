"""Online softmax to base 2, with heads along the last axis."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(-1e30)
"""Used instead of minus infinity, so that differences are not NaN."""


@triton.jit
def capped(logits, SOFTCAP: tl.constexpr):
    """Apply the soft cap, which is defined to base e, to logits to base 2. A cap of 0 is none."""
    if SOFTCAP > 0.0:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(logits * (2.0 / SOFTCAP)))
        logits = SOFTCAP * LOG2E * tanh
    return logits


@triton.jit
def weigh(logits, top, total):
    """Add a block of logits ``[tokens, heads]`` to an online softmax.

    Args:
        top, total: maximum of the logits and sum of the weights so far, ``[heads]``.

    Returns:
        The weights of the block, the new maximum and sum, and the factor by which everything that
        was summed before must be multiplied.
    """
    new_top = tl.maximum(top, tl.max(logits, 0))
    weights = tl.exp2(logits - new_top[None, :])
    older = tl.exp2(top - new_top)
    return weights, new_top, total * older + tl.sum(weights, 0), older


@triton.jit
def exp2_int(exponent):
    """``2 ** exponent``, float32, of an int32 from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)
