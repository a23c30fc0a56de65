"""The merge of the splits, and what it adds to the importance of the high tokens."""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.attend import splits_of
from mikv_vllm.kernels.triton.layout import Stream
from mikv_vllm.kernels.triton.row import load_row
from mikv_vllm.kernels.triton.softmax import LOG2E, NEVER
from mikv_vllm.kernels.triton.stream import byte_pointer

PARTS_AT_ONCE = tl.constexpr(16)


@triton.jit
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
    logits_stride,
    out,
    out_stride,
    hadamard,
    hadamard_scale,
    sinks,
    decay,
    HAS_SINKS: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST_BLOCKS: tl.constexpr,
    L: tl.constexpr,
):
    """Write the output of some query heads and update the scores of some high tokens.

    Grid ``(SPLITS, kv_heads, rows)``; arguments as in ``attend_kernel``, and:

    Args:
        hadamard: bf16 ``[padded, padded]``, signs, 0 beyond the channels.
        hadamard_scale: what makes them a rotation.
        sinks: float32 ``[heads]``, read if ``HAS_SINKS``.
    """
    split, head, index = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = load_row(rows, index)
    if row.token < 0:
        return
    blocks = tl.cdiv(row.high_tokens, 32)
    splits, low_splits = splits_of(row.low_chunks, blocks, SPLITS, LEAST_BLOCKS)
    if split >= splits:
        return
    kv_heads = tl.num_programs(1)
    member = tl.arange(0, L.heads)
    part = tl.arange(0, SPLITS)
    first_part = (index * kv_heads + head) * SPLITS
    sums = partial_sums + first_part * 2 * L.heads
    tops_at = sums + (part * 2 * L.heads)[:, None] + member[None, :]
    written = (part < splits)[:, None]
    tops = tl.load(tops_at, mask=written, other=NEVER)
    totals = tl.load(tops_at + L.heads, mask=written, other=0.0)
    top = tl.max(tops, 0)
    total = tl.sum(totals * tl.exp2(tops - top[None, :]), 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head * L.group + member, mask=member < L.group, other=0.0)
        total += tl.exp2(sink * LOG2E - top)

    channel = tl.arange(0, L.padded)
    outputs = partial_out + first_part * L.heads * L.padded
    for g in range(split, L.group, splits):
        top_of_g = tl.sum(tl.where(member == g, top, 0.0), 0)
        low = tl.zeros([L.padded], tl.float32)
        high = tl.zeros([L.padded], tl.float32)
        for start in range(0, splits, PARTS_AT_ONCE):
            some = start + tl.arange(0, PARTS_AT_ONCE)
            mask = some < splits
            tops_of_g = tl.load(sums + some * 2 * L.heads + g, mask=mask, other=NEVER)
            factor = tl.exp2(tops_of_g - top_of_g)[:, None]
            out_at = outputs + ((some * L.heads + g) * L.padded)[:, None] + channel[None, :]
            weighted = tl.load(out_at, mask=mask[:, None], other=0.0) * factor
            is_low = (some < low_splits)[:, None]
            low += tl.sum(tl.where(is_low, weighted, 0.0), 0)
            high += tl.sum(tl.where(is_low, 0.0, weighted), 0)
        rotated = tl.zeros([L.padded], tl.float32)
        if low_splits > 0:
            signs = tl.load(hadamard + channel[:, None] * L.padded + channel[None, :])
            rotated = tl.sum(signs.to(tl.float32) * low[None, :], 1) * hadamard_scale
        result = (high + rotated) / tl.sum(tl.where(member == g, total, 0.0), 0)
        row_out = out + row.token.to(tl.int64) * out_stride + (head * L.group + g) * L.head_dim
        tl.store(
            row_out + channel, result.to(out.dtype.element_ty), mask=channel < L.head_dim
        )

    stream = Stream(pages + head * head_stride, page_stride, tables + index * table_stride)
    slot = tl.arange(0, 32)
    logits = high_logits + (index * kv_heads + head) * L.group * logits_stride
    for block in range(blocks * split // splits, blocks * (split + 1) // splits):
        token = 32 * block + slot
        valid = token < row.high_tokens
        line = L.header_lines + token // 16 * L.group_lines
        last_line = L.header_lines + (row.high_tokens - 1) // 16 * L.group_lines
        line = tl.minimum(line, last_line)
        at = byte_pointer(stream, line, L.high_scores + 4 * (token % 16), L)
        at = at.to(tl.pointer_type(tl.float32))
        score = tl.load(at, mask=valid, other=0.0) * decay
        mask = valid[:, None] & (member < L.group)[None, :]
        x = tl.load(logits + member[None, :] * logits_stride + token[:, None], mask=mask, other=NEVER)
        weights = tl.exp2(x - top[None, :]) / total[None, :]
        tl.store(at, score + tl.sum(tl.where(mask, weights, 0.0), 1), mask=valid)
