"""Queries of a KV head as right operands of tensor cores, ``[channels, heads]``."""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.softmax import exp2_int


@triton.jit
def load_queries(q, channel, member, LAYER: tl.constexpr):
    """Load queries ``[channels, members]``, with 0 for channels and heads that do not exist.

    Args:
        q: pointer to ``[queries_per_kv_head, head_dim]``.
    """
    inside = (channel < LAYER.head_dim)[:, None] & (member < LAYER.queries_per_kv_head)[None, :]
    return tl.load(q + member[None, :] * LAYER.head_dim + channel[:, None], mask=inside, other=0.0)


@triton.jit
def query_fold(q):
    """Return a power of two for each head, and its inverse.

    Multiplied by it, the product of ``q`` and a byte is in the range of fp16.
    """
    exponent = (tl.max(tl.abs(q), 0).to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    return exp2_int(5 - exponent), exp2_int(exponent - 5)


@triton.jit
def query_parts(per_unit, LAYER: tl.constexpr):
    """Split queries into two fp16 parts, whose products with a byte keep 15 bits of precision.

    The first part has 3 significant bits. Its product with a byte has 11 bits and is exact. The
    second part is at most an eighth as large, and its product is rounded to 11 bits.

    Args:
        per_unit: float32 ``[padded, members]``.

    Returns:
        fp16 ``[padded, 2 * members]``: all first parts, then all second parts.
    """
    bits = per_unit.to(tl.int32, bitcast=True)
    first = ((bits + 0x00100000) & -0x00200000).to(tl.float32, bitcast=True)
    parts = tl.join(first.to(tl.float16), (per_unit - first).to(tl.float16))
    return tl.reshape(tl.permute(parts, (0, 2, 1)), (LAYER.padded, 2 * LAYER.members))
