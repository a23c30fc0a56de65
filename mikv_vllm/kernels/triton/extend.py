"""The next tokens of a prompt into the tiers: choose per head which become low, then write both.

The high tier is read from a copy, so that programs may write to it in any order.
"""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.change import copy_lines
from mikv_vllm.kernels.triton.dot import dot_signs
from mikv_vllm.kernels.triton.high_tier import (
    load_stored,
    read_high,
    score_pointers,
    store_high,
    store_stored,
)
from mikv_vllm.kernels.triton.jit import Kernel
from mikv_vllm.kernels.triton.layout import Stream
from mikv_vllm.kernels.triton.low_tier import write_low_record
from mikv_vllm.kernels.triton.row import CHUNK
from mikv_vllm.kernels.triton.select import BLOCK, split_tokens
from mikv_vllm.kernels.triton.stream import load_frame


@Kernel
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
    """Choose each head's least important of its high tokens and the new ones. Grid ``(kv_heads,)``.

    High tokens count from 0, the new ones follow them.

    Args:
        scores: float32 ``[kv_heads, score_stride]``, of restored tokens, then of new ones.
        keep: factor on the high tokens' own scores, to which theirs are added.
        num_restored: tokens of both tiers; num_tokens: high and new ones.
        recent: newest tokens, which stay.
        merged: out, float32 ``[kv_heads, num_tokens]``, scores.
        order: out, int32 ``[kv_heads, num_tokens]``: the ``num_leaving`` chosen tokens, then the
            rest, both ascending.
    """
    head = tl.program_id(0)
    stream = Stream(pages + head * head_stride, page_stride, tiered_table)
    scores += head * score_stride
    merged += head * num_tokens
    order += head * num_tokens
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        is_new = token >= num_high
        at = score_pointers(stream, tl.minimum(token, num_high - 1), LAYER)
        own = tl.load(at, mask=token < num_high, other=0.0) * keep
        place = tl.where(is_new, token - num_high + num_restored, token)
        added = tl.load(scores + place, mask=token < num_tokens)
        tl.store(merged + token, own + added, mask=token < num_tokens)
    tl.debug_barrier()
    older = num_tokens - recent
    split_tokens(merged, num_tokens, older, num_leaving, order, order + num_leaving, False)


@Kernel
def move_kernel(
    pages, page_stride, head_stride, tiered_table, source, to, num_lines, LAYER: tl.constexpr
):
    """Move chunks of ``num_lines`` from line ``source`` on to line ``to``, where nothing lies yet.

    Grid ``(chunks, kv_heads)``.
    """
    head = tl.program_id(1)
    stream = Stream(pages + head * head_stride, page_stride, tiered_table)
    line = tl.program_id(0) * num_lines
    copy_lines(stream, source + line, to + line, num_lines, LAYER)


@triton.jit
def load_new(data, stride, tokens, channel, mask, LAYER: tl.constexpr):
    """Keys or values of new ``tokens [n]`` at ``channel [c]``: ``[n, c]``, 0 where ``mask [n]`` is
    not.

    Args:
        data: pointer to the head's, ``stride`` from a token to the next.
    """
    at = data + tokens.to(tl.int64)[:, None] * stride + channel[None, :]
    return tl.load(at, mask=mask[:, None] & (channel < LAYER.head_dim)[None, :], other=0.0)


@Kernel
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
    """Write a high group: old tokens as they were stored, then new ones.

    Grid ``(groups, kv_heads)``. Arguments as in :func:`choose_kernel`, and:

    Args:
        copied: pages of the high tier as it was.
        k, v: ``[tokens, kv_heads, head_dim]``, the new tokens, ``k_stride`` and ``v_stride`` apart.
    """
    group, head = tl.program_id(0), tl.program_id(1)
    before = Stream(copied + head * copied_head_stride, copied_page_stride, copied_table)
    stream = Stream(pages + head * head_stride, page_stride, tiered_table)
    place = group * 16 + tl.arange(0, 16)
    mask = place < num_tokens - num_leaving
    place = tl.minimum(place, num_tokens - num_leaving - 1)
    token = tl.load(order + head * num_tokens + num_leaving + place)
    score = tl.load(merged + head * num_tokens + token)

    is_new = token >= num_high
    moves = mask & ~is_new & (token != place)
    old = tl.minimum(token, num_high - 1)
    stored = load_stored(before, old, moves, k.dtype.element_ty, LAYER)
    store_stored(stream, stored, place, moves, k.dtype.element_ty, LAYER)
    tl.store(score_pointers(stream, place, LAYER), score, mask=mask)
    channel = tl.arange(0, LAYER.padded)
    mask &= is_new
    key = load_new(k + head * LAYER.head_dim, k_stride, token - num_high, channel, mask, LAYER)
    value = load_new(v + head * LAYER.head_dim, v_stride, token - num_high, channel, mask, LAYER)
    store_high(stream, key, value, score, place, mask, LAYER)


@Kernel
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
    """Quantize 32 of the chosen tokens and write them, each chunk below the one before.

    Grid ``(chunks, kv_heads)``. Arguments as in :func:`extend_high_kernel`, and:

    Args:
        low_line: line of the lowest chunk that is there.
        integers: scratch, uint8 ``[kv_heads, chunks, 2, 32, head_dim]``.
        hadamard, hadamard_scale: as in ``write_low_kernel``.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    before = Stream(copied + head * copied_head_stride, copied_page_stride, copied_table)
    stream = Stream(pages + head * head_stride, page_stride, tiered_table)
    integers += (head * tl.num_programs(0) + chunk).to(tl.int64) * 64 * LAYER.head_dim
    token = tl.load(order + head * num_tokens + chunk * CHUNK + tl.arange(0, 32))
    is_new = token >= num_high
    new = token - num_high
    channel = tl.arange(0, LAYER.padded)
    center, unit, key_channel = load_frame(stream, LAYER)
    old = tl.minimum(token, num_high - 1)
    keys, values = read_high(before, old, key_channel, k.dtype.element_ty, LAYER)
    k = load_new(k + head * LAYER.head_dim, k_stride, new, key_channel, is_new, LAYER).to(
        tl.float32
    )
    v = load_new(v + head * LAYER.head_dim, v_stride, new, channel, is_new, LAYER).to(tl.float32)
    keys = tl.where(is_new[:, None], k, keys)
    values = tl.where(is_new[:, None], v, values)
    signs = tl.load(hadamard + channel[:, None] * LAYER.padded + channel[None, :])
    rotated = dot_signs(values, signs) * hadamard_scale
    line = low_line - (chunk + 1) * FORMAT.count
    write_low_record(stream, line, keys, center, unit, rotated, integers, LAYER, FORMAT)
