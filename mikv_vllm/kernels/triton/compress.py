"""Native pages into tiers: select, measure the keys, write high groups and low chunks."""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.dot import dot
from mikv_vllm.kernels.triton.high_tier import store_high
from mikv_vllm.kernels.triton.layout import Stream
from mikv_vllm.kernels.triton.low_tier import (
    pack_chunk,
    store_key_metadata,
    store_value_metadata,
)
from mikv_vllm.kernels.triton.native import NativePages, load_native
from mikv_vllm.kernels.triton.quantize import (
    INFINITY,
    KEY_ZERO_STEPS,
    clamp,
    key_steps,
    quantize_values,
    rint,
)
from mikv_vllm.kernels.triton.row import CHUNK
from mikv_vllm.kernels.triton.select import split_tokens
from mikv_vllm.kernels.triton.stream import byte_pointer, load_frame

FEEDBACK_BLOCK = tl.constexpr(16)
"""Channels whose errors reach one another one by one; earlier ones' come as a matrix product."""
KEYS_AT_ONCE = tl.constexpr(64)


@triton.jit
def select_kernel(scores, score_stride, num_tokens, num_high, recent, order, order_stride):
    """Write each head's high positions, then its low ones, both ascending. Grid ``(kv_heads,)``.

    Args:
        scores: float32 ``[kv_heads, score_stride]``; order: int32 ``[kv_heads, order_stride]``.
    """
    head = tl.program_id(0)
    order += head * order_stride
    older = num_tokens - recent
    scores += head * score_stride
    split_tokens(scores, num_tokens, older, num_high - recent, order, order + num_high, True)


@triton.jit
def measure_kernel(
    keys,
    native_page_stride,
    native_token_stride,
    native_head_stride,
    native_table,
    order,
    order_stride,
    num_tokens,
    num_high,
    partial,
    PARTS: tl.constexpr,
    L: tl.constexpr,
):
    """Sum, least and largest of a part of a head's keys, by channel. Grid ``(PARTS, kv_heads)``.

    Extremes are of low tokens; of all, if none is low.

    Args:
        partial: float32 ``[kv_heads, PARTS, 3, padded]``.
    """
    part, head = tl.program_id(0), tl.program_id(1)
    native = NativePages(native_page_stride, native_token_stride, native_table)
    keys += head * native_head_stride
    channel = tl.arange(0, L.padded)
    total = tl.zeros([L.padded], tl.float32)
    least = tl.full([L.padded], INFINITY, tl.float32)
    largest = tl.full([L.padded], -INFINITY, tl.float32)
    first_low = tl.where(num_high < num_tokens, num_high, 0)
    share = tl.cdiv(tl.cdiv(num_tokens, PARTS), KEYS_AT_ONCE) * KEYS_AT_ONCE
    for start in range(part * share, tl.minimum((part + 1) * share, num_tokens), KEYS_AT_ONCE):
        place = start + tl.arange(0, KEYS_AT_ONCE)
        mask = place < num_tokens
        token = tl.load(order + head * order_stride + place, mask=mask, other=0)
        x = load_native(keys, native, token, channel, mask, L).to(tl.float32)
        total += tl.sum(x, 0)
        is_low = (mask & (place >= first_low))[:, None]
        least = tl.minimum(least, tl.min(tl.where(is_low, x, INFINITY), 0))
        largest = tl.maximum(largest, tl.max(tl.where(is_low, x, -INFINITY), 0))
    partial += (head * PARTS + part) * 3 * L.padded + channel
    tl.store(partial, total)
    tl.store(partial + L.padded, least)
    tl.store(partial + 2 * L.padded, largest)


@triton.jit
def frame_kernel(
    pages,
    page_stride,
    head_stride,
    tiered_table,
    partial,
    num_tokens,
    unit_share,
    PARTS: tl.constexpr,
    L: tl.constexpr,
):
    """Write each head's header: centres and units of its keys. Grid ``(kv_heads,)``.

    Args:
        unit_share: unit of a channel whose farthest low key is 1 from its centre.
    """
    head = tl.program_id(0)
    stream = Stream(pages + head * head_stride, page_stride, tiered_table)
    channel = tl.arange(0, L.padded)
    part = tl.arange(0, PARTS)[:, None]
    at = partial + (head * PARTS + part) * 3 * L.padded + channel[None, :]
    mean = tl.sum(tl.load(at), 0) / num_tokens
    center = clamp(mean, -65504.0, 65504.0).to(tl.float16)
    least = tl.min(tl.load(at + L.padded), 0) - center.to(tl.float32)
    largest = tl.max(tl.load(at + 2 * L.padded), 0) - center.to(tl.float32)
    far = tl.maximum(tl.abs(least), tl.abs(largest))
    unit = clamp(far * unit_share, 6e-8, 65504.0).to(tl.float16)
    inside = channel < L.head_dim
    half = tl.pointer_type(tl.float16)
    channel = tl.minimum(channel, L.head_dim - 1)
    tl.store(byte_pointer(stream, 0, 2 * channel, L).to(half), center, mask=inside)
    channel += L.head_dim
    tl.store(byte_pointer(stream, 0, 2 * channel, L).to(half), unit, mask=inside)


@triton.jit
def write_high_kernel(
    keys,
    values,
    native_page_stride,
    native_token_stride,
    native_head_stride,
    native_table,
    pages,
    page_stride,
    head_stride,
    tiered_table,
    scores,
    score_stride,
    order,
    order_stride,
    num_high,
    L: tl.constexpr,
):
    """Write a high group. Grid ``(groups, kv_heads)``."""
    group, head = tl.program_id(0), tl.program_id(1)
    native = NativePages(native_page_stride, native_token_stride, native_table)
    keys += head * native_head_stride
    values += head * native_head_stride
    stream = Stream(pages + head * head_stride, page_stride, tiered_table)
    channel = tl.arange(0, L.padded)
    place = group * 16 + tl.arange(0, 16)
    mask = place < num_high
    token = tl.load(order + head * order_stride + place, mask=mask, other=0)
    k = load_native(keys, native, token, channel, mask, L)
    v = load_native(values, native, token, channel, mask, L)
    score = tl.load(scores + head * score_stride + token, mask=mask, other=0.0)
    place = tl.minimum(place, num_high - 1)
    store_high(stream, k, v, score, place, mask, L)


@triton.jit
def column(x, index):
    """Column ``index`` of ``[n, FEEDBACK_BLOCK]``."""
    lane = tl.arange(0, FEEDBACK_BLOCK)[None, :]
    return tl.sum(tl.where(lane == index, x, 0.0), 1)


@triton.jit
def round_block(x, target, steps, zeros, weights, L: tl.constexpr, BITS: tl.constexpr):
    """Round a block of channels one after the other, each for the errors of those before it.

    Args:
        x, target: keys less their centres, without and with what earlier blocks ask for,
            ``[32, FEEDBACK_BLOCK]``.
        steps, zeros: ``[FEEDBACK_BLOCK]``.
        weights: float32 pointer to the block's part of the feedback's weights.

    Returns:
        Integers and errors, float32, like ``x``.
    """
    lane = tl.arange(0, FEEDBACK_BLOCK)
    offsets = zeros / KEY_ZERO_STEPS
    errors = tl.zeros([32, FEEDBACK_BLOCK], tl.float32)
    numbers = tl.zeros([32, FEEDBACK_BLOCK], tl.float32)
    for i in range(FEEDBACK_BLOCK):
        weight = tl.load(weights + i * L.head_dim + lane)
        step = tl.sum(tl.where(lane == i, steps, 0.0), 0)
        offset = tl.sum(tl.where(lane == i, offsets, 0.0), 0)
        wanted = column(target, i) + tl.sum(errors * weight[None, :], 1)
        number = tl.div_rn(wanted, tl.zeros([32], tl.float32) + step) - offset
        number = rint(clamp(number, 0.0, (1 << BITS) - 1.0))
        error = column(x, i) - step * (number + offset)
        mine = (lane == i)[None, :]
        errors = tl.where(mine, error[:, None], errors)
        numbers = tl.where(mine, number[:, None], numbers)
    return numbers, errors


@triton.jit
def write_values(
    stream, line, values, integers, hadamard, hadamard_scale, L: tl.constexpr, C: tl.constexpr
):
    """Quantize a chunk's values ``[32, padded]``: write scales and zero points into the chunk at
    ``line``, and integers to uint8 ``[32, head_dim]``."""
    row = tl.arange(0, 32)[:, None]
    channel = tl.arange(0, L.padded)
    inside = channel < L.head_dim
    # Products with signs are exact in the cache's dtype.
    signs = tl.load(hadamard + channel[:, None] * L.padded + channel[None, :]).to(values.dtype)
    x = dot(values, signs, tl.zeros([32, L.padded], tl.float32)) * hadamard_scale
    numbers, codes, zeros = quantize_values(x, inside, C.value_groups, C.value_bits)
    at = integers + row * L.head_dim + channel[None, :]
    tl.store(at, numbers.to(tl.uint8), mask=inside[None, :])
    store_value_metadata(stream, line, codes, zeros, L, C)


@triton.jit
def write_low_kernel(
    keys,
    values,
    native_page_stride,
    native_token_stride,
    native_head_stride,
    native_table,
    pages,
    page_stride,
    head_stride,
    tiered_table,
    order,
    order_stride,
    num_high,
    num_chunks,
    low_end,
    channels,
    weights,
    errors,
    integers,
    hadamard,
    hadamard_scale,
    L: tl.constexpr,
    C: tl.constexpr,
):
    """Quantize a chunk, keys with feedback, and write it. Grid ``(chunks, kv_heads)``.

    Args:
        low_end: line behind the last chunk.
        channels: int32 ``[kv_heads, head_dim]`` and weights: float32 ``[kv_heads, head_dim,
            head_dim]``, a :class:`~mikv_vllm.tiers.codec.KeyFeedback` for each head.
        errors: scratch, float32 ``[kv_heads, chunks, 32, head_dim]``.
        integers: scratch, uint8 ``[kv_heads, chunks, 2, 32, head_dim]``.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    native = NativePages(native_page_stride, native_token_stride, native_table)
    keys += head * native_head_stride
    values += head * native_head_stride
    stream = Stream(pages + head * head_stride, page_stride, tiered_table)
    line = low_end - (num_chunks - chunk) * C.count
    channels += head * L.head_dim
    weights += head * L.head_dim * L.head_dim
    slot = head * num_chunks + chunk
    errors += slot * 32 * L.head_dim
    integers += slot * 64 * L.head_dim
    row = tl.arange(0, 32)
    every = row >= 0
    token = tl.load(order + head * order_stride + num_high + chunk * CHUNK + row)
    lane = tl.arange(0, FEEDBACK_BLOCK)
    row_start = row[:, None] * L.head_dim
    for start in range(0, L.head_dim, FEEDBACK_BLOCK):
        channel = tl.load(channels + start + lane)
        center, unit = load_frame(stream, channel, L)
        x = load_native(keys, native, token, channel, every, L).to(tl.float32) - center[None, :]
        scales, steps, zeros = key_steps(tl.min(x, 0), tl.max(x, 0), unit, C.key_bits)
        target = x
        for earlier in range(0, start, FEEDBACK_BLOCK):
            before = tl.load(errors + row_start + earlier + lane[None, :])
            at = weights + (start + lane)[None, :] * L.head_dim + earlier + lane[:, None]
            target = dot(before, tl.load(at), target)
        own = weights + start * L.head_dim + start
        numbers, error = round_block(x, target, steps, zeros, own, L, C.key_bits)
        tl.store(errors + row_start + start + lane[None, :], error)
        tl.store(integers + row_start + channel[None, :], numbers.to(tl.uint8))
        store_key_metadata(stream, line, channel, scales, zeros, channel >= 0, L, C)
        tl.debug_barrier()

    x = load_native(values, native, token, tl.arange(0, L.padded), every, L)
    write_values(stream, line, x, integers + 32 * L.head_dim, hadamard, hadamard_scale, L, C)
    tl.debug_barrier()
    pack_chunk(stream, line, integers, integers + 32 * L.head_dim, L, C)
