"""Decode attention over both tiers: one program for each split of a request and KV head.

Keys and queries meet as ``keys [32, channels] @ queries [channels, heads]``, values and weights as
``values [channels, 32] @ weights [32, heads]``: so the query heads, few of which share a KV head,
are the short side of the tensor core's tile. The integers are multiplied as they are: scales of
keys go into the queries, or into the logits where a token has one, scales of values into the
weights.
"""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.dot import dot
from mikv_vllm.kernels.triton.jit import Kernel
from mikv_vllm.kernels.triton.layout import Stream
from mikv_vllm.kernels.triton.quantize import decode_scale
from mikv_vllm.kernels.triton.queries import load_queries, query_fold, query_parts
from mikv_vllm.kernels.triton.row import load_row
from mikv_vllm.kernels.triton.softmax import LOG2E, NEVER, capped, exp2_int, weigh
from mikv_vllm.kernels.triton.stream import (
    BAND,
    SUBNORMAL,
    byte_pointer,
    channel_order,
    either,
    high_keys,
    high_values,
    key_row_factor,
    load_bytes,
    load_fp16,
    low_keys,
    low_values,
    record_at,
    small_fp16,
    token_order,
    value_channel_order,
    value_row_factor,
    within,
)

STAGES = tl.constexpr(5)
"""Stages of the loops over blocks. The block table's entries take some: below 5, Triton has one
buffer, which it fills at the end of a block and waits for at the start of the next."""
LOW_COST, HIGH_COST = tl.constexpr(4), tl.constexpr(3)
"""Of a block of 32 tokens, by the instructions that it takes."""
LEAST_COST = tl.constexpr(16)
"""Of a split: shorter ones save less than it costs to merge them."""
HIGH_ZERO = tl.constexpr(128)
HIGH_EXPONENT = tl.constexpr(127 - 22)
"""A float32's exponent bits less this count from where the 8-bit scales' exponents do."""


@triton.jit
def splits_of(chunks, blocks, most):
    """How many splits a request gets, and how many of them, the first ones, are for its chunks."""
    low_cost = LOW_COST * chunks
    cost = low_cost + HIGH_COST * blocks
    splits = tl.minimum(most, tl.cdiv(cost, LEAST_COST) + 1)
    # Rounded up: few chunks in one split would take longer than all others.
    low_splits = tl.minimum(tl.cdiv(low_cost * splits, cost), splits - 1)
    return splits, tl.where(chunks > 0, low_splits, 0)


@triton.jit
def add_parts(logits, LAYER: tl.constexpr):
    """Logits ``[32, members]`` from those of both parts."""
    return tl.sum(tl.reshape(logits, (32, 2, LAYER.members)), 1)


@triton.jit
def low_logits(record, per_unit, parts, LAYER: tl.constexpr, FORMAT: tl.constexpr):
    """Logits of a chunk, ``[32, members]``, but for the centres.

    A channel's scale goes into the queries, the scale of a balanced token into its logits.

    Args:
        per_unit: queries by key unit, float32 ``[padded, members]``, by rank in
            :func:`~stream.channel_order`; parts: :func:`~queries.query_parts` of them.
    """
    if FORMAT.keys_per_token:
        token = token_order()
        steps = decode_scale(load_bytes(record, FORMAT.key_scales, token))
        zeros = load_bytes(record, FORMAT.key_scales, FORMAT.key_slices + token) ^ 0x80
        zeros = zeros.to(tl.float32) - 128.0
        logits = tl.dot(low_keys(record, 0, LAYER.padded // BAND, FORMAT), parts)
        logits = add_parts(logits * (key_row_factor(FORMAT) * steps)[:, None], LAYER)
        logits += tl.sum(per_unit, 0)[None, :] * (zeros * steps)[:, None]
    else:
        rank = within(channel_order(LAYER.padded), LAYER.padded, LAYER.head_dim)
        scales = small_fp16(load_bytes(record, FORMAT.key_scales, rank))
        zeros = small_fp16(load_bytes(record, FORMAT.key_scales, FORMAT.key_slices + rank) ^ 0x80)
        zeros = (zeros.to(tl.float32) - 128.0) * (0.5 * scales.to(tl.float32))
        logits = tl.dot(low_keys(record, 0, LAYER.padded // BAND, FORMAT), parts * scales[:, None])
        logits = add_parts(logits * key_row_factor(FORMAT)[:, None], LAYER)
        logits += tl.sum(per_unit * zeros[:, None], 0)[None, :]
    return logits


@triton.jit
def fill_columns(logits, LAYER: tl.constexpr):
    """Repeat ``[32, members]`` until it has ``heads`` columns, which a tensor core wants."""
    if LAYER.members < LAYER.heads:
        copies = tl.broadcast_to(
            logits[:, None, :], (32, LAYER.heads // LAYER.members, LAYER.members)
        )
        logits = tl.reshape(copies, (32, LAYER.heads))
    return logits


@triton.jit
def replaced(items, INDEX: tl.constexpr, item):
    """A tuple with another item at ``INDEX``."""
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
    """Attention over low chunks ``first`` to ``last``.

    Args:
        q: pointer to the KV head's queries, ``[group, head_dim]``.
        low_line: line of chunk 0.
        scale: factor on the logits, to base 2.

    Returns:
        Maximum and sum of the weights, ``[heads]``, and for each value group its channels of the
        output, not rotated back, ``[channels, heads]`` in :func:`~stream.value_channel_order`.
    """
    GROUPS: tl.constexpr = FORMAT.value_groups
    CHANNELS: tl.constexpr = LAYER.padded // GROUPS
    top = tl.full([LAYER.heads], NEVER, tl.float32)
    total = tl.full([LAYER.heads], 0, tl.float32)
    exponent = 0
    sums = (tl.full([CHANNELS, LAYER.heads], 0, tl.float32),) * GROUPS
    offsets = (tl.full([32, LAYER.heads], 0, tl.float32),) * GROUPS

    rank = within(channel_order(LAYER.padded), LAYER.padded, LAYER.head_dim)
    header = record_at(stream, low_line * 0, LAYER.header_lines, LAYER)
    channel = load_bytes(header, 0, 4 * LAYER.head_dim + rank)
    # Ranks beyond the last repeat it, but weigh nothing.
    channel = tl.where(channel_order(LAYER.padded) < LAYER.head_dim, channel, LAYER.head_dim)
    q = load_queries(q, channel, tl.arange(0, LAYER.members), LAYER).to(tl.float32) * scale
    base = tl.sum(q * load_fp16(header, 2 * rank)[:, None], 0)
    per_unit = q * load_fp16(header, 2 * (LAYER.head_dim + rank))[:, None]
    fold, unfold = query_fold(per_unit)
    per_unit *= fold[None, :]
    parts = query_parts(per_unit, LAYER)
    token = tl.arange(0, 32 * GROUPS)
    order = token_order()
    for chunk in tl.range(first, last, num_stages=STAGES):
        record = record_at(stream, low_line + chunk * FORMAT.count, FORMAT.count, LAYER)
        logits = low_logits(record, per_unit, parts, LAYER, FORMAT)
        logits = capped(logits * unfold[None, :] + base[None, :], SOFTCAP)
        logits = fill_columns(logits, LAYER)
        weights, top, total, older = weigh(logits, top, total)

        largest = tl.max(load_bytes(record, FORMAT.value_scales, token), 0) // 8
        largest = tl.maximum(exponent, largest)
        older *= exp2_int(exponent - largest)
        exponent = largest
        for g in tl.static_range(GROUPS):
            code = load_bytes(record, FORMAT.value_scales, 32 * g + order)
            bits = (code - 8 * exponent + 8 * 127) << 20
            scaled = weights * bits.to(tl.float32, bitcast=True)[:, None]
            values = low_values(record, 4 * g, CHANNELS, LAYER, FORMAT)
            group = tl.dot(values, scaled.to(tl.float16), sums[g] * older[None, :])
            sums = replaced(sums, g, group)
            zeros = load_bytes(record, FORMAT.value_scales, 32 * (GROUPS + g) + order) ^ 0x80
            zeros = zeros.to(tl.float32) - 128.0
            offset = offsets[g] * older[None, :] + scaled * zeros[:, None]
            offsets = replaced(offsets, g, offset)
    unit = exp2_int(exponent - 22)
    for g in tl.static_range(GROUPS):
        group = sums[g] * value_row_factor(CHANNELS, FORMAT)[:, None]
        group = (group + tl.sum(offsets[g], 0)[None, :]) * unit
        sums = replaced(sums, g, group)
    return top, total, sums


@triton.jit
def store_high_logits(logits_out, logits_stride, logits, tokens, valid, LAYER: tl.constexpr):
    """Keep logits ``[32, heads]`` of high tokens for the importance update."""
    member = tl.arange(0, LAYER.heads)
    at = logits_out + member[None, :] * logits_stride + tokens[:, None]
    tl.store(at, logits, mask=valid[:, None] & (member < LAYER.queries_per_kv_head)[None, :])


@triton.jit
def attend_high(
    stream,
    q,
    first,
    last,
    high_tokens,
    logits_out,
    logits_stride,
    scale,
    SOFTCAP: tl.constexpr,
    LAYER: tl.constexpr,
):
    """Attention over blocks ``first`` to ``last`` of 32 high tokens of 8 bits.

    Args:
        q: float32 ``[padded, heads]``, not scaled, in :func:`~stream.channel_order`.
        logits_out: where logits of these tokens go, ``[group, logits_stride]``.

    Returns:
        As :func:`attend_low`, the output as one tensor.
    """
    top = tl.full([LAYER.heads], NEVER, tl.float32)
    total = tl.full([LAYER.heads], 0, tl.float32)
    exponent = 0
    out = tl.full([LAYER.padded, LAYER.heads], 0, tl.float32)
    offset = tl.full([32, LAYER.heads], 0, tl.float32)
    # The cache's dtype fits fp16, but for its range.
    fold, unfold = query_fold(q)
    unfold *= scale
    folded = (q * fold[None, :]).to(tl.float16)
    zero = HIGH_ZERO * tl.sum(folded.to(tl.float32), 0)
    order = token_order()
    half = tl.arange(0, 2)[:, None, None, None]
    last_group = tl.cdiv(high_tokens, 16) - 1
    for block in tl.range(first, last, num_stages=STAGES):
        tokens = 32 * block + order
        valid = tokens < high_tokens
        line = LAYER.header_lines + 2 * block * LAYER.high_record_lines
        group = record_at(stream, line, LAYER.high_record_lines, LAYER)
        # The other half of an odd last group is read in its place, and weighs nothing.
        line = LAYER.header_lines + tl.minimum(2 * block + 1, last_group) * LAYER.high_record_lines
        next_high_record = record_at(stream, line, LAYER.high_record_lines, LAYER)
        groups = either(group, next_high_record, half)
        scales = either(group, next_high_record, order // 16)
        key_scales = load_fp16(scales, LAYER.high_key_scales + 2 * (order % 16))
        value_scales = load_fp16(scales, LAYER.high_value_scales + 2 * (order % 16))
        value_scales = tl.where(valid, value_scales, 0.0)

        logits = (
            tl.dot(high_keys(groups, 0, LAYER.padded // 16, LAYER), folded) * SUBNORMAL
            - zero[None, :]
        )
        logits *= key_scales[:, None] * unfold[None, :]
        logits = tl.where(valid[:, None], capped(logits, SOFTCAP), NEVER)
        store_high_logits(logits_out, logits_stride, logits, tokens, valid, LAYER)
        weights, top, total, older = weigh(logits, top, total)

        bits = value_scales.to(tl.int32, bitcast=True)
        largest = tl.maximum(exponent, tl.max((bits >> 23) - HIGH_EXPONENT, 0))
        older *= exp2_int(exponent - largest)
        exponent = largest
        scaled = weights * (value_scales * exp2_int(22 - exponent))[:, None]
        values = high_values(groups, 0, LAYER.padded // 16, LAYER)
        out = tl.dot(values, scaled.to(tl.float16), out * older[None, :])
        offset = offset * older[None, :] + scaled.to(tl.float16).to(tl.float32)
    out = out * SUBNORMAL - HIGH_ZERO * tl.sum(offset, 0)[None, :]
    return top, total, out * exp2_int(exponent - 22)


@triton.jit
def attend_high_16(
    stream,
    q,
    first,
    last,
    high_tokens,
    logits_out,
    logits_stride,
    scale,
    SOFTCAP: tl.constexpr,
    LAYER: tl.constexpr,
):
    """As :func:`attend_high`, with 16-bit tokens; channels in their own order.

    Args:
        q: ``[padded, heads]`` in the cache's dtype, not scaled.
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
        start = (
            LAYER.header_lines + tl.minimum(tokens, high_tokens - 1) // 16 * LAYER.high_record_lines
        )
        byte = 2 * LAYER.head_dim * (slot % 16)
        at = byte_pointer(stream, start[:, None], byte[:, None] + 2 * channel[None, :], LAYER)
        mask = valid[:, None] & inside[None, :]
        keys = tl.load(at.to(tl.pointer_type(q.dtype)), mask=mask, other=0.0)
        logits = dot(keys, q, tl.full([32, LAYER.heads], 0, tl.float32)) * scale
        logits = tl.where(valid[:, None], capped(logits, SOFTCAP), NEVER)
        store_high_logits(logits_out, logits_stride, logits, tokens, valid, LAYER)
        weights, top, total, older = weigh(logits, top, total)
        byte = LAYER.high_values + byte[None, :] + 2 * channel[:, None]
        at = byte_pointer(stream, start[None, :], byte, LAYER)
        mask = inside[:, None] & valid[None, :]
        values = tl.load(at.to(tl.pointer_type(q.dtype)), mask=mask, other=0.0)
        # Two parts keep twice the bits of a weight.
        upper = weights.to(q.dtype)
        lower = (weights - upper.to(tl.float32)).to(q.dtype)
        out = dot(values, upper, dot(values, lower, out * older[None, :]))
    return top, total, out


@Kernel
def attend_kernel(
    pages,
    page_stride,
    head_stride,
    rows,
    tables,
    table_stride,
    q,
    q_stride,
    partial_out,
    partial_sums,
    high_logits,
    starts,
    logits_stride,
    scale,
    SOFTCAP: tl.constexpr,
    LAYER: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Write one split's unnormalized output, softmax maximum and sum, and high tokens' logits.

    Grid ``(splits, kv_heads, rows)``; rows of another low format are another launch's.

    Args:
        pages: int32 words; strides count words.
        rows: int32 ``[rows, ROW_FIELDS]``; tables: int32 ``[rows, table_stride]``.
        q: ``[tokens, heads, head_dim]``, rows ``q_stride`` apart.
        partial_out: float32 ``[rows, kv_heads, splits, heads, padded]``; low splits' are rotated.
        partial_sums: float32 ``[rows, kv_heads, splits, 2, heads]``.
        high_logits: float32 ``[kv_heads, group, logits_stride]``, to base 2, of the high tokens of
            all rows.
        starts: int32 ``[rows]``, the first of each.
    """
    split, head, index = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = load_row(rows, index)
    if (row.token < 0) | (row.key_code != FORMAT.key_code) | (row.value_bits != FORMAT.value_bits):
        return
    blocks = tl.cdiv(row.high_tokens, 32)
    splits, low_splits = splits_of(row.low_records, blocks, tl.num_programs(0))
    if split >= splits:
        return
    kv_heads = tl.num_programs(1)
    stream = Stream(pages + head * head_stride, page_stride, tables + index * table_stride)
    column = tl.arange(0, LAYER.heads)
    q += row.token.to(tl.int64) * q_stride + head * LAYER.queries_per_kv_head * LAYER.head_dim
    part = (index * kv_heads + head).to(tl.int64) * tl.num_programs(0) + split
    partial_sums += part * 2 * LAYER.heads + column
    partial_out += part * LAYER.heads * LAYER.padded + column[None, :] * LAYER.padded
    scale *= LOG2E
    if split < low_splits:
        first = row.low_records * split // low_splits
        last = row.low_records * (split + 1) // low_splits
        low_line = row.low_end_line - row.low_records * FORMAT.count
        top, total, sums = attend_low(
            stream, q, first, last, low_line, scale, SOFTCAP, LAYER, FORMAT
        )
        GROUPS: tl.constexpr = FORMAT.value_groups
        CHANNELS: tl.constexpr = LAYER.padded // GROUPS
        for g in tl.static_range(GROUPS):
            rotated = CHANNELS * g + value_channel_order(CHANNELS)
            tl.store(partial_out + rotated[:, None], sums[g])
        tl.store(partial_sums, top)
        tl.store(partial_sums + LAYER.heads, total)
    else:
        first = blocks * (split - low_splits) // (splits - low_splits)
        last = blocks * (split - low_splits + 1) // (splits - low_splits)
        high_logits += head.to(tl.int64) * LAYER.queries_per_kv_head * logits_stride + tl.load(
            starts + index
        )
        high = row.high_tokens
        if LAYER.high_bits == 8:
            to = value_channel_order(LAYER.padded)
            raw = load_queries(q, channel_order(LAYER.padded), column, LAYER).to(tl.float32)
            top, total, out = attend_high(
                stream, raw, first, last, high, high_logits, logits_stride, scale, SOFTCAP, LAYER
            )
        else:
            to = tl.arange(0, LAYER.padded)
            raw = load_queries(q, to, column, LAYER)
            top, total, out = attend_high_16(
                stream,
                raw,
                first,
                last,
                high,
                high_logits,
                logits_stride,
                scale,
                SOFTCAP,
                LAYER,
            )
        tl.store(partial_out + to[:, None], out)
        tl.store(partial_sums, top)
        tl.store(partial_sums + LAYER.heads, total)
