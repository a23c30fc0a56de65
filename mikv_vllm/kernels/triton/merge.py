"""Merge of the splits of decode attention, and update of the scores of the tails."""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.high_tier import score_pointers
from mikv_vllm.kernels.triton.jit import kernel
from mikv_vllm.kernels.triton.layout import Stream
from mikv_vllm.kernels.triton.row import load_row
from mikv_vllm.kernels.triton.softmax import LOG2E, NEVER
from mikv_vllm.kernels.triton.splits import MOST_SPLITS, splits_of

PARTS_AT_ONCE = tl.constexpr(16)
"""Splits whose outputs a program loads at a time."""
TOKENS_AT_ONCE = tl.constexpr(128)
"""High tokens whose scores a program loads at a time."""


@triton.jit
def row_splits(rows, index, most):
    """Return the number of splits of a row, and how many of them read the low tier."""
    row = load_row(rows, index)
    return splits_of(row.low_records, tl.cdiv(row.high_tokens, 32), most)


@triton.jit
def merge_sums(rows, first, last, partial_sums, head, kv_heads, most, LAYER: tl.constexpr):
    """Combine the softmax maxima and sums of the rows from ``first`` to ``last``, both included.

    Returns:
        The maximum and the sum of each query head, ``[heads]``.
    """
    member = tl.arange(0, LAYER.heads)
    part = tl.arange(0, MOST_SPLITS)
    top = tl.full([LAYER.heads], NEVER, tl.float32)
    total = tl.full([LAYER.heads], 0, tl.float32)
    for index in range(first, last + 1):
        splits, _ = row_splits(rows, index, most)
        sums = partial_sums + (index * kv_heads + head).to(tl.int64) * most * 2 * LAYER.heads
        at = sums + (part * 2 * LAYER.heads)[:, None] + member[None, :]
        written = (part < splits)[:, None]
        tops = tl.load(at, mask=written, other=NEVER)
        totals = tl.load(at + LAYER.heads, mask=written, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        total = total * tl.exp2(top - new_top) + tl.sum(
            totals * tl.exp2(tops - new_top[None, :]), 0
        )
        top = new_top
    return top, total


@triton.jit
def merge_output(
    rows,
    first,
    last,
    partial_sums,
    partial_out,
    head,
    kv_heads,
    most,
    g,
    top,
    hadamard,
    hadamard_scale,
    LAYER: tl.constexpr,
):
    """Compute the output of query head ``g`` over the rows from ``first`` to ``last``.

    Args:
        top: maximum of the logits of the query head.

    Returns:
        The output before normalization, ``[padded]``.
    """
    channel = tl.arange(0, LAYER.padded)
    low = tl.full([LAYER.padded], 0, tl.float32)
    high = tl.full([LAYER.padded], 0, tl.float32)
    has_low = False
    for index in range(first, last + 1):
        splits, low_splits = row_splits(rows, index, most)
        has_low |= low_splits > 0
        slot = (index * kv_heads + head).to(tl.int64) * most * LAYER.heads
        for start in range(0, splits, PARTS_AT_ONCE):
            part = start + tl.arange(0, PARTS_AT_ONCE)
            mask = part < splits
            at = partial_sums + 2 * slot + part * 2 * LAYER.heads + g
            factor = tl.exp2(tl.load(at, mask=mask, other=NEVER) - top)
            at = (slot + part * LAYER.heads + g) * LAYER.padded
            at = partial_out + at[:, None] + channel[None, :]
            weighted = tl.load(at, mask=mask[:, None], other=0.0) * factor[:, None]
            is_low = (part < low_splits)[:, None]
            low += tl.sum(tl.where(is_low, weighted, 0.0), 0)
            high += tl.sum(tl.where(is_low, 0.0, weighted), 0)
    if has_low:
        signs = tl.load(hadamard + channel[:, None] * LAYER.padded + channel[None, :])
        high += tl.sum(signs.to(tl.float32) * low[None, :], 1) * hadamard_scale
    return high


@triton.jit
def add_importance(
    stream, logits, logits_stride, first, last, high_tokens, top, total, decay, LAYER: tl.constexpr
):
    """Multiply the scores of high tokens by ``decay``, and add their attention weights.

    Args:
        logits: ``[queries_per_kv_head, logits_stride]``.
        first, last: blocks of ``TOKENS_AT_ONCE`` tokens, ``last`` excluded.
        top, total: maximum and sum of the softmax of each head, ``[heads]``.
    """
    member = tl.arange(0, LAYER.heads)
    for block in range(first, last):
        token = TOKENS_AT_ONCE * block + tl.arange(0, TOKENS_AT_ONCE)
        valid = token < high_tokens
        at = score_pointers(stream, tl.minimum(token, high_tokens - 1), LAYER)
        score = tl.load(at, mask=valid, other=0.0) * decay
        mask = valid[:, None] & (member < LAYER.queries_per_kv_head)[None, :]
        place = logits + member[None, :] * logits_stride + token[:, None]
        weights = tl.exp2(tl.load(place, mask=mask, other=NEVER) - top[None, :]) / total[None, :]
        tl.store(at, score + tl.sum(tl.where(mask, weights, 0.0), 1), mask=valid)


@kernel(
    counts=("table_stride",),
    tables=("starts",),
    specialized=("page_stride", "head_stride", "logits_stride", "out_stride"),
)
def merge_kernel(
    pages,
    page_stride,
    head_stride,
    rows,
    tables,
    table_stride,
    partial_out,
    partial_sums,
    high_logits,
    starts,
    logits_stride,
    out,
    out_stride,
    hadamard,
    hadamard_scale,
    sinks,
    decay,
    HAS_SINKS: tl.constexpr,
    LAYER: tl.constexpr,
):
    """Write the output of some query heads, and update the scores of some high tokens of the tail.

    Grid ``(splits, kv_heads, rows)``, with at most ``MOST_SPLITS`` splits. Programs of rows that
    are not tails return at once; those of a tail merge all rows of its request. Arguments are as
    in ``attend_kernel``, and:

    Args:
        out: out, ``[tokens, heads, head_dim]``; out_stride: elements per token.
        hadamard: signs of the rotation, bf16 ``[padded, padded]``, 0 from ``head_dim`` on.
        hadamard_scale: factor of the signs that makes them a rotation.
        sinks: float32 ``[heads]``, read if ``HAS_SINKS``.
        decay: factor of every score.
    """
    split, head, index = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = load_row(rows, index)
    if (row.token < 0) | (row.blocks == 0):
        return
    most, kv_heads = tl.num_programs(0), tl.num_programs(1)
    first = index - row.blocks + 1
    top, total = merge_sums(rows, first, index, partial_sums, head, kv_heads, most, LAYER)
    member = tl.arange(0, LAYER.heads)
    if HAS_SINKS:
        sink = tl.load(
            sinks + head * LAYER.queries_per_kv_head + member,
            mask=member < LAYER.queries_per_kv_head,
            other=0.0,
        )
        total += tl.exp2(sink * LOG2E - top)

    channel = tl.arange(0, LAYER.padded)
    for g in range(split, LAYER.queries_per_kv_head, most):
        mine = member == g
        result = merge_output(
            rows,
            first,
            index,
            partial_sums,
            partial_out,
            head,
            kv_heads,
            most,
            g,
            tl.sum(tl.where(mine, top, 0.0), 0),
            hadamard,
            hadamard_scale,
            LAYER,
        )
        result /= tl.sum(tl.where(mine, total, 0.0), 0)
        to = (
            out
            + row.token.to(tl.int64) * out_stride
            + (head * LAYER.queries_per_kv_head + g) * LAYER.head_dim
        )
        tl.store(to + channel, result.to(out.dtype.element_ty), mask=channel < LAYER.head_dim)

    stream = Stream(pages + head * head_stride, page_stride, tables + index * table_stride)
    blocks = tl.cdiv(row.high_tokens, TOKENS_AT_ONCE)
    add_importance(
        stream,
        high_logits
        + head.to(tl.int64) * LAYER.queries_per_kv_head * logits_stride
        + tl.load(starts + index),
        logits_stride,
        blocks * split // most,
        blocks * (split + 1) // most,
        row.high_tokens,
        top,
        total,
        decay,
        LAYER,
    )
