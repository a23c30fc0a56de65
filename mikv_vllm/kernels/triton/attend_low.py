"""Decode attention over low records.

The stored integers are multiplied without dequantizing them. Key scales are multiplied into the
queries (one scale per channel), or into the logits (one scale per token). Value scales are
multiplied into the weights.
"""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.constants import BAND_CHANNELS, LOW_RECORD_TOKENS, SCALE_BIAS
from mikv_vllm.kernels.triton.orders import channel_order, token_order
from mikv_vllm.kernels.triton.quantize import decode_scale
from mikv_vllm.kernels.triton.queries import load_queries, query_fold, query_parts
from mikv_vllm.kernels.triton.record import STAGES, load_bytes, load_fp16, record_at, small_fp16
from mikv_vllm.kernels.triton.softmax import NEVER, capped, exp2_int, weigh
from mikv_vllm.kernels.triton.stream import within
from mikv_vllm.kernels.triton.unpack import key_row_factor, low_keys, low_values, value_row_factor


@triton.jit
def add_parts(logits, LAYER: tl.constexpr):
    """Add the logits of both query parts: ``[32, 2 * members]`` to ``[32, members]``."""
    return tl.sum(tl.reshape(logits, (LOW_RECORD_TOKENS, 2, LAYER.members)), 1)


@triton.jit
def low_logits(record, per_unit, parts, LAYER: tl.constexpr, FORMAT: tl.constexpr):
    """Return the logits of a low record without the part of the centres, ``[32, members]``.

    Args:
        per_unit: queries times key units, float32 ``[padded, members]``; its rows are ranks in
            :func:`~orders.channel_order`.
        parts: :func:`~queries.query_parts` of ``per_unit``.
    """
    if FORMAT.keys_per_token:
        token = token_order()
        steps = decode_scale(load_bytes(record, FORMAT.key_scales, token))
        zeros = load_bytes(record, FORMAT.key_scales, FORMAT.key_slices + token) ^ 0x80
        zeros = zeros.to(tl.float32) - 128.0
        logits = tl.dot(low_keys(record, 0, LAYER.padded // BAND_CHANNELS, FORMAT), parts)
        logits = add_parts(logits * (key_row_factor(FORMAT) * steps)[:, None], LAYER)
        logits += tl.sum(per_unit, 0)[None, :] * (zeros * steps)[:, None]
    else:
        rank = within(channel_order(LAYER.padded), LAYER.padded, LAYER.head_dim)
        scales = small_fp16(load_bytes(record, FORMAT.key_scales, rank))
        zeros = small_fp16(load_bytes(record, FORMAT.key_scales, FORMAT.key_slices + rank) ^ 0x80)
        zeros = (zeros.to(tl.float32) - 128.0) * (0.5 * scales.to(tl.float32))
        keys = low_keys(record, 0, LAYER.padded // BAND_CHANNELS, FORMAT)
        logits = tl.dot(keys, parts * scales[:, None])
        logits = add_parts(logits * key_row_factor(FORMAT)[:, None], LAYER)
        logits += tl.sum(per_unit * zeros[:, None], 0)[None, :]
    return logits


@triton.jit
def fill_columns(logits, LAYER: tl.constexpr):
    """Repeat ``[32, members]`` to ``[32, heads]``, the least width of a tensor core's tile."""
    if LAYER.members < LAYER.heads:
        copies = tl.broadcast_to(
            logits[:, None, :],
            (LOW_RECORD_TOKENS, LAYER.heads // LAYER.members, LAYER.members),
        )
        logits = tl.reshape(copies, (LOW_RECORD_TOKENS, LAYER.heads))
    return logits


@triton.jit
def replaced(items, INDEX: tl.constexpr, item):
    """Return a copy of a tuple in which the item at ``INDEX`` is ``item``."""
    return items[:INDEX] + (item,) + items[INDEX + 1 :]  # noqa: RUF005


@triton.jit
def attend_low(
    stream,
    q,
    first,
    last,
    low_line,
    scale,
    SOFTCAP: tl.constexpr,
    LAYER: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Compute attention over the low records from ``first`` up to, but not including, ``last``.

    Args:
        q: pointer to the queries of the KV head, ``[queries_per_kv_head, head_dim]``.
        low_line: stream line of record 0.
        scale: factor of the logits, which are to base 2.

    Returns:
        The maximum of the logits and the sum of the weights, ``[heads]`` each, and a tuple with
        the unnormalized output of each value group: rotated values, ``[channels, heads]``, with
        channels in :func:`~orders.value_channel_order`.
    """
    GROUPS: tl.constexpr = FORMAT.value_groups
    CHANNELS: tl.constexpr = LAYER.padded // GROUPS
    top = tl.full([LAYER.heads], NEVER, tl.float32)
    total = tl.full([LAYER.heads], 0, tl.float32)
    exponent = 0
    sums = (tl.full([CHANNELS, LAYER.heads], 0, tl.float32),) * GROUPS
    offsets = (tl.full([LOW_RECORD_TOKENS, LAYER.heads], 0, tl.float32),) * GROUPS

    rank = within(channel_order(LAYER.padded), LAYER.padded, LAYER.head_dim)
    header = record_at(stream, low_line * 0, LAYER.header_lines, LAYER)
    channel = load_bytes(header, 0, LAYER.header_order + rank)
    # Ranks from head_dim on repeat the last rank. Their query is 0, because no channel has this
    # number.
    channel = tl.where(channel_order(LAYER.padded) < LAYER.head_dim, channel, LAYER.head_dim)
    q = load_queries(q, channel, tl.arange(0, LAYER.members), LAYER).to(tl.float32) * scale
    base = tl.sum(q * load_fp16(header, 2 * (LAYER.header_centers + rank))[:, None], 0)
    per_unit = q * load_fp16(header, 2 * (LAYER.header_units + rank))[:, None]
    fold, unfold = query_fold(per_unit)
    per_unit *= fold[None, :]
    parts = query_parts(per_unit, LAYER)
    token = tl.arange(0, LOW_RECORD_TOKENS * GROUPS)
    order = token_order()
    for index in tl.range(first, last, num_stages=STAGES):
        record = record_at(stream, low_line + index * FORMAT.count, FORMAT.count, LAYER)
        logits = low_logits(record, per_unit, parts, LAYER, FORMAT)
        logits = capped(logits * unfold[None, :] + base[None, :], SOFTCAP)
        logits = fill_columns(logits, LAYER)
        weights, top, total, older = weigh(logits, top, total)

        largest = tl.max(load_bytes(record, FORMAT.value_scales, token), 0) // 8
        largest = tl.maximum(exponent, largest)
        older *= exp2_int(exponent - largest)
        exponent = largest
        for g in tl.static_range(GROUPS):
            code = load_bytes(record, FORMAT.value_scales, order + LOW_RECORD_TOKENS * g)
            bits = (code - 8 * exponent + 8 * 127) << 20
            scaled = weights * bits.to(tl.float32, bitcast=True)[:, None]
            values = low_values(record, 4 * g, CHANNELS, LAYER, FORMAT)
            group_sums = tl.dot(values, scaled.to(tl.float16), sums[g] * older[None, :])
            sums = replaced(sums, g, group_sums)
            byte = order + LOW_RECORD_TOKENS * (GROUPS + g)
            zeros = load_bytes(record, FORMAT.value_scales, byte) ^ 0x80
            zeros = zeros.to(tl.float32) - 128.0
            offset = offsets[g] * older[None, :] + scaled * zeros[:, None]
            offsets = replaced(offsets, g, offset)
    unit = exp2_int(exponent - SCALE_BIAS)
    for g in tl.static_range(GROUPS):
        group_sums = sums[g] * value_row_factor(CHANNELS, FORMAT)[:, None]
        group_sums = (group_sums + tl.sum(offsets[g], 0)[None, :]) * unit
        sums = replaced(sums, g, group_sums)
    return top, total, sums
