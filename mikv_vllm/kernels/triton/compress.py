"""Kernels of compress: select high tokens, measure keys, write the header and both tiers."""

import triton.language as tl

from mikv_vllm.kernels.triton.constants import HIGH_RECORD_TOKENS, LOW_RECORD_TOKENS
from mikv_vllm.kernels.triton.dot import dot
from mikv_vllm.kernels.triton.high_tier import store_high
from mikv_vllm.kernels.triton.jit import kernel
from mikv_vllm.kernels.triton.layout import Stream
from mikv_vllm.kernels.triton.low_tier import write_low_record, write_low_values
from mikv_vllm.kernels.triton.native import NATIVE_STRIDES, NativePages, load_native
from mikv_vllm.kernels.triton.quantize import INFINITY, clamp, key_tops
from mikv_vllm.kernels.triton.select import split_tokens
from mikv_vllm.kernels.triton.stream import frame_pointers, load_frame

KEYS_AT_ONCE = tl.constexpr(64)
"""Tokens whose keys a program loads at a time."""


@kernel(
    counts=("score_stride", "num_tokens", "num_high", "recent", "order_stride"),
    num_warps=8,
)
def select_kernel(scores, score_stride, num_tokens, num_high, recent, order, order_stride):
    """Write the positions of the high tokens, then those of the low tokens, both ascending.

    Grid ``(kv_heads,)``.

    Args:
        scores: float32 ``[kv_heads, score_stride]``.
        order: out, int32 ``[kv_heads, order_stride]``.
    """
    head = tl.program_id(0)
    order += head * order_stride
    older = num_tokens - recent
    scores += head * score_stride
    split_tokens(scores, num_tokens, older, num_high - recent, order, order + num_high, True)


@kernel(
    counts=("order_stride", "num_tokens", "first_low"),
    tables=("native_table",),
    specialized=NATIVE_STRIDES,
    num_warps=8,
)
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
    """Write sums and extremes of a part of the keys of a head, by channel.

    Grid ``(PARTS, kv_heads)``.

    Args:
        keys: native keys; their strides are in elements.
        order: of :func:`select_kernel`.
        first_low: index in ``order`` of the first token whose keys count for the extremes.
        partial: out, float32 ``[kv_heads, PARTS, 3, padded]``: sum, least and largest key.
        ranges: out, float64 ``[kv_heads, PARTS, padded]``: sum of the squared ranges of the low
            records, which start at ``first_low``.
    """
    part, head = tl.program_id(0), tl.program_id(1)
    native = NativePages(native_page_stride, native_token_stride, native_table)
    keys += head * native_head_stride
    channel = tl.arange(0, LAYER.padded)
    total = tl.full([LAYER.padded], 0, tl.float32)
    least = tl.full([LAYER.padded], INFINITY, tl.float32)
    largest = tl.full([LAYER.padded], -INFINITY, tl.float32)
    squares = tl.full([LAYER.padded], 0, tl.float64)
    # Low records start at multiples of their size from here.
    first = first_low - tl.cdiv(first_low, LOW_RECORD_TOKENS) * LOW_RECORD_TOKENS
    share = tl.cdiv(tl.cdiv(num_tokens - first, PARTS), KEYS_AT_ONCE) * KEYS_AT_ONCE
    first += part * share
    for start in range(first, tl.minimum(first + share, num_tokens), KEYS_AT_ONCE):
        place = start + tl.arange(0, KEYS_AT_ONCE)
        mask = (place >= 0) & (place < num_tokens)
        token = tl.load(order + head * order_stride + place, mask=mask, other=0)
        x = load_native(keys, native, token, channel, mask, LAYER).to(tl.float32)
        total += tl.sum(x, 0)
        is_low = (mask & (place >= first_low))[:, None]
        by_record: tl.constexpr = (
            KEYS_AT_ONCE // LOW_RECORD_TOKENS,
            LOW_RECORD_TOKENS,
            LAYER.padded,
        )
        low = tl.min(tl.reshape(tl.where(is_low, x, INFINITY), by_record), 1)
        high = tl.max(tl.reshape(tl.where(is_low, x, -INFINITY), by_record), 1)
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


@kernel(
    counts=("num_tokens",),
    tables=("tiered_table",),
    specialized=("page_stride", "head_stride"),
)
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
    """Write the header of each head: centres, units and channels, by rank. Grid ``(kv_heads,)``.

    Args:
        partial: of :func:`measure_kernel`.
        channels: channel of each rank, int64 ``[kv_heads, head_dim]``.
        largest_queries: largest absolute query of each channel, float32 ``[kv_heads, head_dim]``;
            read if keys have one scale per token.
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
        # With the largest scale, 255, keys twice as far from the centre can be stored.
        share = tl.div_rn(2.0, 255.0 * key_tops(rank, LAYER, FORMAT))
        unit = clamp(far * share, 6e-8, 65504.0)
    center_at, unit_at, channel_at = frame_pointers(stream, rank, LAYER)
    tl.store(center_at, center, mask=inside)
    tl.store(unit_at, unit.to(tl.float16), mask=inside)
    tl.store(channel_at, channel.to(tl.uint8), mask=inside)


@kernel(
    counts=("score_stride", "order_stride", "num_high"),
    tables=("native_table", "tiered_table"),
    specialized=(*NATIVE_STRIDES, "page_stride", "head_stride"),
    num_warps=8,
)
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
    """Write one high record. Grid ``(high records, kv_heads)``."""
    record, head = tl.program_id(0), tl.program_id(1)
    native = NativePages(native_page_stride, native_token_stride, native_table)
    keys += head * native_head_stride
    values += head * native_head_stride
    stream = Stream(pages + head * head_stride, page_stride, tiered_table)
    channel = tl.arange(0, LAYER.padded)
    place = record * HIGH_RECORD_TOKENS + tl.arange(0, HIGH_RECORD_TOKENS)
    mask = place < num_high
    token = tl.load(order + head * order_stride + place, mask=mask, other=0)
    k = load_native(keys, native, token, channel, mask, LAYER)
    v = load_native(values, native, token, channel, mask, LAYER)
    score = tl.load(scores + head * score_stride + token, mask=mask, other=0.0)
    place = tl.minimum(place, num_high - 1)
    store_high(stream, k, v, score, place, mask, LAYER)


@kernel(
    counts=("order_stride", "num_high", "num_low_records", "low_end_line"),
    tables=("native_table", "tiered_table"),
    specialized=(*NATIVE_STRIDES, "page_stride", "head_stride"),
)
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
    """Quantize 32 tokens and write their low record. Grid ``(low records, kv_heads)``.

    Args:
        low_end_line: line where the last low record ends.
        integers: scratch, uint8 ``[kv_heads, low records, 2, 32, head_dim]``.
        hadamard: signs of the rotation, bf16 ``[padded, padded]``, 0 from ``head_dim`` on.
        hadamard_scale: factor of the signs that makes them a rotation.
    """
    record, head = tl.program_id(0), tl.program_id(1)
    native = NativePages(native_page_stride, native_token_stride, native_table)
    stream = Stream(pages + head * head_stride, page_stride, tiered_table)
    line = low_end_line - (num_low_records - record) * FORMAT.count
    integers += (head * num_low_records + record) * 64 * LAYER.head_dim
    row = tl.arange(0, 32)
    every = row >= 0
    token = tl.load(order + head * order_stride + num_high + record * LOW_RECORD_TOKENS + row)
    channel = tl.arange(0, LAYER.padded)
    v = load_native(values + head * native_head_stride, native, token, channel, every, LAYER)
    # Products with signs are exact in the dtype of the cache.
    signs = tl.load(hadamard + channel[:, None] * LAYER.padded + channel[None, :]).to(v.dtype)
    rotated = dot(v, signs, tl.full([32, LAYER.padded], 0, tl.float32)) * hadamard_scale
    # Loaded after the product, which needs most registers.
    center, unit, key_channel = load_frame(stream, LAYER)
    k = load_native(keys + head * native_head_stride, native, token, key_channel, every, LAYER)
    write_low_values(stream, line, rotated, integers, LAYER, FORMAT)
    write_low_record(stream, line, k, center, unit, integers, LAYER, FORMAT)
