"""Native pages into tiers: select, measure the keys, write high groups and low chunks."""

import triton.language as tl

from mikv_vllm.kernels.triton.dot import dot
from mikv_vllm.kernels.triton.high_tier import store_high
from mikv_vllm.kernels.triton.jit import Kernel
from mikv_vllm.kernels.triton.layout import Stream
from mikv_vllm.kernels.triton.low_tier import write_low_record
from mikv_vllm.kernels.triton.native import NativePages, load_native
from mikv_vllm.kernels.triton.quantize import INFINITY, clamp, key_tops
from mikv_vllm.kernels.triton.row import CHUNK
from mikv_vllm.kernels.triton.select import split_tokens
from mikv_vllm.kernels.triton.stream import frame_pointers, load_frame

KEYS_AT_ONCE = tl.constexpr(64)


@Kernel
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


@Kernel
def measure_kernel(
    keys,
    native_page_stride,
    native_token_stride,
    native_head_stride,
    native_table,
    order,
    order_stride,
    num_tokens,
    first_low,
    partial,
    ranges,
    PARTS: tl.constexpr,
    LAYER: tl.constexpr,
):
    """Sums and extremes of a part of a head's keys, by channel. Grid ``(PARTS, kv_heads)``.

    Args:
        first_low: place in ``order`` of the first token whose keys are among the extremes.
        partial: float32 ``[kv_heads, PARTS, 3, padded]``: sum, least and largest.
        ranges: float64 ``[kv_heads, PARTS, padded]``: sum over chunks from ``first_low`` on of
            their squared ranges.
    """
    part, head = tl.program_id(0), tl.program_id(1)
    native = NativePages(native_page_stride, native_token_stride, native_table)
    keys += head * native_head_stride
    channel = tl.arange(0, LAYER.padded)
    total = tl.full([LAYER.padded], 0, tl.float32)
    least = tl.full([LAYER.padded], INFINITY, tl.float32)
    largest = tl.full([LAYER.padded], -INFINITY, tl.float32)
    squares = tl.full([LAYER.padded], 0, tl.float64)
    # Chunks start at multiples of their size from here.
    first = first_low - tl.cdiv(first_low, CHUNK) * CHUNK
    share = tl.cdiv(tl.cdiv(num_tokens - first, PARTS), KEYS_AT_ONCE) * KEYS_AT_ONCE
    first += part * share
    for start in range(first, tl.minimum(first + share, num_tokens), KEYS_AT_ONCE):
        place = start + tl.arange(0, KEYS_AT_ONCE)
        mask = (place >= 0) & (place < num_tokens)
        token = tl.load(order + head * order_stride + place, mask=mask, other=0)
        x = load_native(keys, native, token, channel, mask, LAYER).to(tl.float32)
        total += tl.sum(x, 0)
        is_low = (mask & (place >= first_low))[:, None]
        chunked: tl.constexpr = (KEYS_AT_ONCE // CHUNK, CHUNK, LAYER.padded)
        low = tl.min(tl.reshape(tl.where(is_low, x, INFINITY), chunked), 1)
        high = tl.max(tl.reshape(tl.where(is_low, x, -INFINITY), chunked), 1)
        least = tl.minimum(least, tl.min(low, 0))
        largest = tl.maximum(largest, tl.max(high, 0))
        span = tl.where(low <= high, high - low, 0.0).to(tl.float64)
        squares += tl.sum(span * span, 0)
    slot = head * PARTS + part
    tl.store(ranges + slot * LAYER.padded + channel, squares)
    partial += slot * 3 * LAYER.padded + channel
    tl.store(partial, total)
    tl.store(partial + LAYER.padded, least)
    tl.store(partial + 2 * LAYER.padded, largest)


@Kernel
def frame_kernel(
    pages,
    page_stride,
    head_stride,
    tiered_table,
    partial,
    channels,
    largest_queries,
    num_tokens,
    PARTS: tl.constexpr,
    LAYER: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Write each head's header: centres, units and channels, by rank. Grid ``(kv_heads,)``.

    Args:
        partial: of :func:`measure_kernel`; channels: of each rank, int64 ``[kv_heads, head_dim]``.
        largest_queries: of each channel without signs, float32 ``[kv_heads, head_dim]``, read if
            keys are balanced.
    """
    head = tl.program_id(0)
    stream = Stream(pages + head * head_stride, page_stride, tiered_table)
    rank = tl.arange(0, LAYER.padded)
    inside = rank < LAYER.head_dim
    channel = tl.load(channels + head * LAYER.head_dim + rank, mask=inside, other=0)
    part = tl.arange(0, PARTS)[:, None]
    at = partial + (head * PARTS + part) * 3 * LAYER.padded + channel[None, :]
    if FORMAT.keys_per_token:
        center = tl.full([LAYER.padded], 0, tl.float16)
    else:
        mean = tl.sum(tl.load(at), 0) / num_tokens
        center = clamp(mean, -65504.0, 65504.0).to(tl.float16)
    least = tl.min(tl.load(at + LAYER.padded), 0) - center.to(tl.float32)
    largest = tl.max(tl.load(at + 2 * LAYER.padded), 0) - center.to(tl.float32)
    far = tl.maximum(tl.abs(least), tl.abs(largest))
    if FORMAT.keys_per_token:
        query = tl.load(largest_queries + head * LAYER.head_dim + channel)
        unit = clamp(tl.sqrt_rn(tl.div_rn(far, tl.maximum(query, 1e-6))), 1e-3, 65504.0)
    else:
        # The largest scale, 255, covers twice the farthest key.
        share = tl.div_rn(2.0, 255.0 * key_tops(rank, LAYER, FORMAT))
        unit = clamp(far * share, 6e-8, 65504.0)
    center_at, unit_at, channel_at = frame_pointers(stream, rank, LAYER)
    tl.store(center_at, center, mask=inside)
    tl.store(unit_at, unit.to(tl.float16), mask=inside)
    tl.store(channel_at, channel.to(tl.uint8), mask=inside)


@Kernel
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
    LAYER: tl.constexpr,
):
    """Write a high group. Grid ``(groups, kv_heads)``."""
    group, head = tl.program_id(0), tl.program_id(1)
    native = NativePages(native_page_stride, native_token_stride, native_table)
    keys += head * native_head_stride
    values += head * native_head_stride
    stream = Stream(pages + head * head_stride, page_stride, tiered_table)
    channel = tl.arange(0, LAYER.padded)
    place = group * 16 + tl.arange(0, 16)
    mask = place < num_high
    token = tl.load(order + head * order_stride + place, mask=mask, other=0)
    k = load_native(keys, native, token, channel, mask, LAYER)
    v = load_native(values, native, token, channel, mask, LAYER)
    score = tl.load(scores + head * score_stride + token, mask=mask, other=0.0)
    place = tl.minimum(place, num_high - 1)
    store_high(stream, k, v, score, place, mask, LAYER)


@Kernel
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
    num_low_records,
    low_end_line,
    integers,
    hadamard,
    hadamard_scale,
    LAYER: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Quantize a chunk and write it. Grid ``(chunks, kv_heads)``.

    Args:
        low_end_line: line behind the last chunk.
        integers: scratch, uint8 ``[kv_heads, chunks, 2, 32, head_dim]``.
        hadamard: bf16 ``[padded, padded]``, signs, 0 beyond the channels.
        hadamard_scale: what makes them a rotation.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    native = NativePages(native_page_stride, native_token_stride, native_table)
    stream = Stream(pages + head * head_stride, page_stride, tiered_table)
    line = low_end_line - (num_low_records - chunk) * FORMAT.count
    integers += (head * num_low_records + chunk) * 64 * LAYER.head_dim
    row = tl.arange(0, 32)
    every = row >= 0
    token = tl.load(order + head * order_stride + num_high + chunk * CHUNK + row)
    center, unit, key_channel = load_frame(stream, LAYER)
    k = load_native(keys + head * native_head_stride, native, token, key_channel, every, LAYER)
    channel = tl.arange(0, LAYER.padded)
    v = load_native(values + head * native_head_stride, native, token, channel, every, LAYER)
    # Products with signs are exact in the cache's dtype.
    signs = tl.load(hadamard + channel[:, None] * LAYER.padded + channel[None, :]).to(v.dtype)
    rotated = dot(v, signs, tl.full([32, LAYER.padded], 0, tl.float32)) * hadamard_scale
    write_low_record(stream, line, k, center, unit, rotated, integers, LAYER, FORMAT)
