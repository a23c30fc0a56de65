"""Decode attention over high records, in blocks of 32 tokens."""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.constants import HIGH_OFFSET, HIGH_RECORD_TOKENS, SCALE_BIAS
from mikv_vllm.kernels.triton.dot import dot
from mikv_vllm.kernels.triton.orders import token_order
from mikv_vllm.kernels.triton.queries import query_fold
from mikv_vllm.kernels.triton.record import STAGES, either, load_fp16, record_at
from mikv_vllm.kernels.triton.softmax import NEVER, capped, exp2_int, weigh
from mikv_vllm.kernels.triton.stream import byte_pointer
from mikv_vllm.kernels.triton.unpack import SUBNORMAL, high_keys, high_values

HIGH_EXPONENT = tl.constexpr(127 - SCALE_BIAS.value)
"""Difference between the exponent bits of a float32 and the exponent of an 8-bit scale."""


@triton.jit
def store_high_logits(logits_out, logits_stride, logits, tokens, mask, LAYER: tl.constexpr):
    """Store logits ``[32, heads]`` of high tokens, from which their scores are updated."""
    member = tl.arange(0, LAYER.heads)
    at = logits_out + member[None, :] * logits_stride + tokens[:, None]
    tl.store(at, logits, mask=mask[:, None] & (member < LAYER.queries_per_kv_head)[None, :])


@triton.jit
def attend_high(
    stream,
    q,
    first,
    last,
    high_tokens,
    num_stored,
    logits_out,
    logits_stride,
    scale,
    SOFTCAP: tl.constexpr,
    LAYER: tl.constexpr,
):
    """Compute attention over 8-bit high tokens, blocks ``first`` to ``last`` (exclusive).

    Args:
        q: float32 ``[padded, heads]``, without ``scale``, channels in
            :func:`~orders.channel_order`.
        num_stored: logits of the tokens before this one are stored.
        logits_out: where the logits of these tokens are stored,
            ``[queries_per_kv_head, logits_stride]``.

    Returns:
        As :func:`~attend_low.attend_low`, with the output as one tensor ``[padded, heads]``.
    """
    top = tl.full([LAYER.heads], NEVER, tl.float32)
    total = tl.full([LAYER.heads], 0, tl.float32)
    exponent = 0
    out = tl.full([LAYER.padded, LAYER.heads], 0, tl.float32)
    offset = tl.full([32, LAYER.heads], 0, tl.float32)
    # fp16 has the precision of the cache's dtype. The fold keeps the queries in its range.
    fold, unfold = query_fold(q)
    unfold *= scale
    folded = (q * fold[None, :]).to(tl.float16)
    zero = HIGH_OFFSET * tl.sum(folded.to(tl.float32), 0)
    order = token_order()
    half = tl.arange(0, 2)[:, None, None, None]
    last_record = tl.cdiv(high_tokens, HIGH_RECORD_TOKENS) - 1
    for block in tl.range(first, last, num_stages=STAGES):
        tokens = 32 * block + order
        valid = tokens < high_tokens
        line = LAYER.header_lines + 2 * block * LAYER.high_record_lines
        record = record_at(stream, line, LAYER.high_record_lines, LAYER)
        # If the number of records is odd, the last one is read twice. Its copy has weight 0.
        line = LAYER.header_lines + tl.minimum(2 * block + 1, last_record) * LAYER.high_record_lines
        next_record = record_at(stream, line, LAYER.high_record_lines, LAYER)
        records = either(record, next_record, half)
        scales = either(record, next_record, order // HIGH_RECORD_TOKENS)
        slot = order % HIGH_RECORD_TOKENS
        key_scales = load_fp16(scales, LAYER.high_key_scales + 2 * slot)
        value_scales = load_fp16(scales, LAYER.high_value_scales + 2 * slot)
        value_scales = tl.where(valid, value_scales, 0.0)

        logits = (
            tl.dot(high_keys(records, 0, LAYER.padded // 16, LAYER), folded) * SUBNORMAL
            - zero[None, :]
        )
        logits *= key_scales[:, None] * unfold[None, :]
        logits = tl.where(valid[:, None], capped(logits, SOFTCAP), NEVER)
        store_high_logits(logits_out, logits_stride, logits, tokens, tokens < num_stored, LAYER)
        weights, top, total, older = weigh(logits, top, total)

        bits = value_scales.to(tl.int32, bitcast=True)
        largest = tl.maximum(exponent, tl.max((bits >> 23) - HIGH_EXPONENT, 0))
        older *= exp2_int(exponent - largest)
        exponent = largest
        scaled = weights * (value_scales * exp2_int(-exponent + SCALE_BIAS))[:, None]
        values = high_values(records, 0, LAYER.padded // 16, LAYER)
        out = tl.dot(values, scaled.to(tl.float16), out * older[None, :])
        offset = offset * older[None, :] + scaled.to(tl.float16).to(tl.float32)
    out = out * SUBNORMAL - HIGH_OFFSET * tl.sum(offset, 0)[None, :]
    return top, total, out * exp2_int(exponent - SCALE_BIAS)


@triton.jit
def attend_high_16(
    stream,
    q,
    first,
    last,
    high_tokens,
    num_stored,
    logits_out,
    logits_stride,
    scale,
    SOFTCAP: tl.constexpr,
    LAYER: tl.constexpr,
):
    """Compute attention over 16-bit high tokens, as :func:`attend_high` does over 8-bit ones.

    Args:
        q: ``[padded, heads]`` in the dtype of the cache, without ``scale``, channels ascending.
    """
    top = tl.full([LAYER.heads], NEVER, tl.float32)
    total = tl.full([LAYER.heads], 0, tl.float32)
    out = tl.full([LAYER.padded, LAYER.heads], 0, tl.float32)
    channel = tl.arange(0, LAYER.padded)
    slot = tl.arange(0, 32)
    inside = channel < LAYER.head_dim
    for block in range(first, last):
        tokens = 32 * block + slot
        valid = tokens < high_tokens
        record = tl.minimum(tokens, high_tokens - 1) // HIGH_RECORD_TOKENS
        start = LAYER.header_lines + record * LAYER.high_record_lines
        byte = 2 * LAYER.head_dim * (slot % HIGH_RECORD_TOKENS)
        at = byte_pointer(stream, start[:, None], byte[:, None] + 2 * channel[None, :], LAYER)
        mask = valid[:, None] & inside[None, :]
        keys = tl.load(at.to(tl.pointer_type(q.dtype)), mask=mask, other=0.0)
        logits = dot(keys, q, tl.full([32, LAYER.heads], 0, tl.float32)) * scale
        logits = tl.where(valid[:, None], capped(logits, SOFTCAP), NEVER)
        store_high_logits(logits_out, logits_stride, logits, tokens, tokens < num_stored, LAYER)
        weights, top, total, older = weigh(logits, top, total)
        byte = LAYER.high_values + byte[None, :] + 2 * channel[:, None]
        at = byte_pointer(stream, start[None, :], byte, LAYER)
        mask = inside[:, None] & valid[None, :]
        values = tl.load(at.to(tl.pointer_type(q.dtype)), mask=mask, other=0.0)
        # The weights are multiplied in two parts, which have twice the precision of one.
        upper = weights.to(q.dtype)
        lower = (weights - upper.to(tl.float32)).to(q.dtype)
        out = dot(values, upper, dot(values, lower, out * older[None, :]))
    return top, total, out
