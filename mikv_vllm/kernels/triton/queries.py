"""Queries of a KV head as right operands of a tensor core: ``[channels, heads]``."""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.softmax import exp2_int


@triton.jit
def load_queries(q, channel, member, LAYER: tl.constexpr):
    """Queries ``[channels, members]``; 0 beyond the channels and the group."""
    inside = (channel < LAYER.head_dim)[:, None] & (member < LAYER.queries_per_kv_head)[None, :]
    return tl.load(q + member[None, :] * LAYER.head_dim + channel[:, None], mask=inside, other=0.0)


@triton.jit
def query_fold(q):
    """A power of two for each head that makes ``q`` times a byte fit fp16, and its inverse."""
    exponent = (tl.max(tl.abs(q), 0).to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    return exp2_int(5 - exponent), exp2_int(exponent - 5)


@triton.jit
def query_parts(per_unit, LAYER: tl.constexpr):
    """Split query factors so that fp16 products with a byte keep 15 bits of them.

    The first part has 3 significant bits, 11 after the multiplication: exact. Of the second, an
    eighth as large, 11 remain.

    Args:
        per_unit: ``[padded, LAYER.members]``.

    Returns:
        fp16 ``[padded, 2 * LAYER.members]``, the first parts in front.
    """
    bits = per_unit.to(tl.int32, bitcast=True)
    first = ((bits + 0x00100000) & -0x00200000).to(tl.float32, bitcast=True)
    parts = tl.join(first.to(tl.float16), (per_unit - first).to(tl.float16))
    return tl.reshape(tl.permute(parts, (0, 2, 1)), (LAYER.padded, 2 * LAYER.members))
