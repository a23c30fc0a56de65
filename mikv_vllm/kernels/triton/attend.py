"""Decode attention over blocks. Each program computes one split of a block and KV head.

Logits are ``keys [32, channels] @ queries [channels, heads]``. Outputs are
``values [channels, 32] @ weights [32, heads]``. Both have the query heads on the short side of the
tensor core's tile, because few query heads share a KV head.
"""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.attend_high import attend_high, attend_high_16
from mikv_vllm.kernels.triton.attend_low import attend_low
from mikv_vllm.kernels.triton.jit import kernel
from mikv_vllm.kernels.triton.layout import Stream
from mikv_vllm.kernels.triton.orders import channel_order, value_channel_order
from mikv_vllm.kernels.triton.queries import load_queries
from mikv_vllm.kernels.triton.row import load_row
from mikv_vllm.kernels.triton.softmax import LOG2E
from mikv_vllm.kernels.triton.splits import splits_of


@triton.jit
def has_format(row, FORMATS: tl.constexpr, INDEX: tl.constexpr):
    """Whether a row has the low format at ``INDEX``."""
    FORMAT: tl.constexpr = FORMATS.lines[INDEX]
    return (row.key_code == FORMAT.key_code) & (row.value_bits == FORMAT.value_bits)


@triton.jit
def attend_low_split(
    row,
    stream,
    q,
    split,
    low_splits,
    partial_out,
    partial_sums,
    scale,
    SOFTCAP: tl.constexpr,
    LAYER: tl.constexpr,
    FORMATS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Compute one split of the low tier of a row, if the row has the low format at ``INDEX``.

    Other arguments are as in :func:`attend_kernel`; ``partial_out`` and ``partial_sums`` point to
    the split.
    """
    FORMAT: tl.constexpr = FORMATS.lines[INDEX]
    if has_format(row, FORMATS, INDEX):
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


@kernel(
    counts=("table_stride",),
    tables=("starts",),
    specialized=("page_stride", "head_stride", "q_stride", "logits_stride"),
    num_stages=2,
    maxnreg=255,
)
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
    FORMATS: tl.constexpr,
):
    """Write the unnormalized output, and the softmax maximum and sum, of one split.

    A split of the high tier of a tail also writes the logits of its tokens. Grid
    ``(splits, kv_heads, rows)``. Programs of rows with another low format than ``FORMATS`` return
    at once.

    Args:
        pages: the cache as int32 words; page_stride, head_stride: in words.
        rows: int32 ``[rows, ROW_FIELDS]``; tables: int32 ``[rows, table_stride]``.
        q: ``[tokens, heads, head_dim]``; q_stride: elements per token.
        partial_out: out, float32 ``[rows, kv_heads, splits, heads, padded]``. Splits of the low
            tier write rotated values.
        partial_sums: out, float32 ``[rows, kv_heads, splits, 2, heads]``.
        high_logits: out, float32 ``[kv_heads, queries_per_kv_head, logits_stride]``, to base 2, of
            the high tokens of all tails.
        starts: int32 ``[rows]``, the first position of each row in ``high_logits``.
    """
    split, head, index = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = load_row(rows, index)
    matches = 0
    for i in tl.static_range(len(FORMATS.lines)):
        matches += has_format(row, FORMATS, i).to(tl.int32)
    if (row.token < 0) | (matches == 0):
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
        for i in tl.static_range(len(FORMATS.lines)):
            attend_low_split(
                row,
                stream,
                q,
                split,
                low_splits,
                partial_out,
                partial_sums,
                scale,
                SOFTCAP,
                LAYER,
                FORMATS,
                i,
            )
    else:
        first = blocks * (split - low_splits) // (splits - low_splits)
        last = blocks * (split - low_splits + 1) // (splits - low_splits)
        high_logits += head.to(tl.int64) * LAYER.queries_per_kv_head * logits_stride + tl.load(
            starts + index
        )
        high = row.high_tokens
        num_stored = tl.where(row.blocks > 0, high, 0)
        if LAYER.high_bits == 8:
            to = value_channel_order(LAYER.padded)
            raw = load_queries(q, channel_order(LAYER.padded), column, LAYER).to(tl.float32)
            top, total, out = attend_high(
                stream,
                raw,
                first,
                last,
                high,
                num_stored,
                high_logits,
                logits_stride,
                scale,
                SOFTCAP,
                LAYER,
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
                num_stored,
                high_logits,
                logits_stride,
                scale,
                SOFTCAP,
                LAYER,
            )
        tl.store(partial_out + to[:, None], out)
        tl.store(partial_sums, top)
        tl.store(partial_sums + LAYER.heads, total)
