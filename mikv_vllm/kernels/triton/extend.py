"""Kernels of extend: choose the tokens of each head that become low, then write both tiers.

The high tier is read from a copy, so that programs can write to it in any order.
"""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.constants import HIGH_RECORD_TOKENS, LOW_RECORD_TOKENS
from mikv_vllm.kernels.triton.dot import dot_signs
from mikv_vllm.kernels.triton.high_tier import (
    load_stored,
    read_high_keys,
    read_high_values,
    score_pointers,
    store_high,
    store_stored,
)
from mikv_vllm.kernels.triton.jit import kernel
from mikv_vllm.kernels.triton.layout import Stream
from mikv_vllm.kernels.triton.low_tier import write_low_record, write_low_values
from mikv_vllm.kernels.triton.select import BLOCK, split_tokens
from mikv_vllm.kernels.triton.stream import load_frame

COPIED_STRIDES = ("copied_page_stride", "copied_head_stride")
"""Arguments of kernels: strides of the copy of the high tier, in words."""


@kernel(
    counts=("score_stride", "num_high", "num_restored", "num_tokens", "recent", "num_leaving"),
    tables=("tiered_table",),
    specialized=("page_stride", "head_stride"),
)
def choose_kernel(
    pages,
    page_stride,
    head_stride,
    tiered_table,
    scores,
    score_stride,
    keep,
    num_high,
    num_restored,
    num_tokens,
    recent,
    num_leaving,
    merged,
    order,
    LAYER: tl.constexpr,
):
    """Choose the least important tokens among the high and the new tokens of each head.

    Tokens are numbered from the first high token on; new tokens follow the high tokens. Grid
    ``(kv_heads,)``.

    Args:
        scores: float32 ``[kv_heads, score_stride]``, of restored tokens, then of new tokens.
        keep: factor of the stored scores of high tokens, before ``scores`` are added to them.
        num_restored: number of tokens in both tiers; num_tokens: number of high and new tokens.
        recent: number of the newest tokens, which are not chosen.
        num_leaving: number of tokens to choose.
        merged: out, float32 ``[kv_heads, num_tokens]``: the new scores.
        order: out, int32 ``[kv_heads, num_tokens]``: the chosen tokens, then all others, both
            ascending.
    """
    head = tl.program_id(0)
    stream = Stream(pages + head * head_stride, page_stride, tiered_table)
    scores += head * score_stride
    merged += head * num_tokens
    order += head * num_tokens
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        is_new = token >= num_high
        at = score_pointers(stream, tl.maximum(tl.minimum(token, num_high - 1), 0), LAYER)
        own = tl.load(at, mask=token < num_high, other=0.0) * keep
        place = tl.where(is_new, token - num_high + num_restored, token)
        added = tl.load(scores + place, mask=token < num_tokens)
        tl.store(merged + token, own + added, mask=token < num_tokens)
    tl.debug_barrier()
    older = num_tokens - recent
    split_tokens(merged, num_tokens, older, num_leaving, order, order + num_leaving, False)


@triton.jit
def load_new(data, stride, tokens, channel, mask, LAYER: tl.constexpr):
    """Load keys or values of new ``tokens [n]`` at ``channel [c]``: ``[n, c]``, 0 where masked.

    Args:
        data: pointer to the keys or values of the KV head; stride: elements per token.
        mask: ``[n]``.
    """
    at = data + tokens.to(tl.int64)[:, None] * stride + channel[None, :]
    return tl.load(at, mask=mask[:, None] & (channel < LAYER.head_dim)[None, :], other=0.0)


@kernel(
    counts=("num_high", "num_tokens", "num_leaving"),
    tables=("tiered_table",),
    specialized=(*COPIED_STRIDES, "page_stride", "head_stride", "k_stride", "v_stride"),
    num_warps=8,
)
def extend_high_kernel(
    copied,
    copied_page_stride,
    copied_head_stride,
    copied_table,
    pages,
    page_stride,
    head_stride,
    tiered_table,
    k,
    k_stride,
    v,
    v_stride,
    merged,
    order,
    num_high,
    num_tokens,
    num_leaving,
    LAYER: tl.constexpr,
):
    """Write one high record. Old tokens are copied as stored, new tokens are quantized.

    Grid ``(high records, kv_heads)``. Arguments are as in :func:`choose_kernel`, and:

    Args:
        copied: a copy of the pages of the high tier; copied_table: their block table.
        k, v: the new tokens, ``[tokens, kv_heads, head_dim]``; k_stride, v_stride: elements per
            token.
    """
    record, head = tl.program_id(0), tl.program_id(1)
    before = Stream(copied + head * copied_head_stride, copied_page_stride, copied_table)
    stream = Stream(pages + head * head_stride, page_stride, tiered_table)
    place = record * HIGH_RECORD_TOKENS + tl.arange(0, HIGH_RECORD_TOKENS)
    mask = place < num_tokens - num_leaving
    place = tl.minimum(place, num_tokens - num_leaving - 1)
    token = tl.load(order + head * num_tokens + num_leaving + place)
    score = tl.load(merged + head * num_tokens + token)

    is_new = token >= num_high
    moves = mask & ~is_new & (token != place)
    old = tl.maximum(tl.minimum(token, num_high - 1), 0)
    stored = load_stored(before, old, moves, k.dtype.element_ty, LAYER)
    store_stored(stream, stored, place, moves, k.dtype.element_ty, LAYER)
    tl.store(score_pointers(stream, place, LAYER), score, mask=mask)
    channel = tl.arange(0, LAYER.padded)
    mask &= is_new
    key = load_new(k + head * LAYER.head_dim, k_stride, token - num_high, channel, mask, LAYER)
    value = load_new(v + head * LAYER.head_dim, v_stride, token - num_high, channel, mask, LAYER)
    store_high(stream, key, value, score, place, mask, LAYER)


@kernel(
    counts=("num_high", "num_tokens", "low_line"),
    tables=("tiered_table",),
    specialized=(*COPIED_STRIDES, "page_stride", "head_stride", "k_stride", "v_stride"),
    num_warps=8,
)
def extend_low_kernel(
    copied,
    copied_page_stride,
    copied_head_stride,
    copied_table,
    pages,
    page_stride,
    head_stride,
    tiered_table,
    k,
    k_stride,
    v,
    v_stride,
    order,
    num_high,
    num_tokens,
    low_line,
    integers,
    hadamard,
    hadamard_scale,
    LAYER: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Quantize 32 of the chosen tokens and write their low record, each below the one before.

    Grid ``(new low records, kv_heads)``. Arguments are as in :func:`extend_high_kernel`, and:

    Args:
        low_line: line where the existing low records start.
        integers: scratch, uint8 ``[kv_heads, new low records, 2, 32, head_dim]``.
        hadamard, hadamard_scale: as in ``write_low_kernel``.
    """
    record, head = tl.program_id(0), tl.program_id(1)
    before = Stream(copied + head * copied_head_stride, copied_page_stride, copied_table)
    stream = Stream(pages + head * head_stride, page_stride, tiered_table)
    integers += (head * tl.num_programs(0) + record).to(tl.int64) * 64 * LAYER.head_dim
    token = tl.load(order + head * num_tokens + record * LOW_RECORD_TOKENS + tl.arange(0, 32))
    is_new = token >= num_high
    new = token - num_high
    channel = tl.arange(0, LAYER.padded)
    old = tl.maximum(tl.minimum(token, num_high - 1), 0)
    values = read_high_values(before, old, k.dtype.element_ty, LAYER)
    v = load_new(v + head * LAYER.head_dim, v_stride, new, channel, is_new, LAYER).to(tl.float32)
    values = tl.where(is_new[:, None], v, values)
    signs = tl.load(hadamard + channel[:, None] * LAYER.padded + channel[None, :])
    line = low_line - (record + 1) * FORMAT.count
    write_low_values(
        stream, line, dot_signs(values, signs) * hadamard_scale, integers, LAYER, FORMAT
    )
    # The keys are read when the values are written: both do not fit into the registers.
    tl.debug_barrier()
    center, unit, key_channel = load_frame(stream, LAYER)
    keys = read_high_keys(before, old, key_channel, k.dtype.element_ty, LAYER)
    k = load_new(k + head * LAYER.head_dim, k_stride, new, key_channel, is_new, LAYER).to(
        tl.float32
    )
    keys = tl.where(is_new[:, None], k, keys)
    write_low_record(stream, line, keys, center, unit, integers, LAYER, FORMAT)
