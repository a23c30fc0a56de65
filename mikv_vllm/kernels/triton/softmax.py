"""Online softmax in base 2, heads along the last axis."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(-1e30)
"""Stands for minus infinity, but differences of it are numbers."""


@triton.jit
def capped(logits, SOFTCAP: tl.constexpr):
    """Apply a soft cap, which is in base e, to logits in base 2; 0 is none."""
    if SOFTCAP > 0.0:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(logits * (2.0 / SOFTCAP)))
        logits = SOFTCAP * LOG2E * tanh
    return logits


@triton.jit
def weigh(logits, top, total):
    """Take in a block ``[keys, heads]``.

    Returns:
        Its weights, the new maximum and sum, and the factor on everything summed before.
    """
    new_top = tl.maximum(top, tl.max(logits, 0))
    weights = tl.exp2(logits - new_top[None, :])
    older = tl.exp2(top - new_top)
    return weights, new_top, total * older + tl.sum(weights, 0), older


@triton.jit
def exp2_int(exponent):
    """``2 ** exponent`` of an int32 from -126 to 127, float32."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)
