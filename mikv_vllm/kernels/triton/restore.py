"""Kernels of restore: dequantize both tiers into native pages."""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.constants import BAND_CHANNELS, KEY_ZERO_STEPS, LOW_RECORD_TOKENS
from mikv_vllm.kernels.triton.dot import dot_signs
from mikv_vllm.kernels.triton.high_tier import read_high_keys, read_high_values
from mikv_vllm.kernels.triton.jit import kernel
from mikv_vllm.kernels.triton.layout import Stream
from mikv_vllm.kernels.triton.native import NATIVE_STRIDES, store_native
from mikv_vllm.kernels.triton.orders import channel_order, token_order, value_channel_order
from mikv_vllm.kernels.triton.quantize import decode_scale
from mikv_vllm.kernels.triton.record import load_bytes, load_fp16, load_signed, record_at
from mikv_vllm.kernels.triton.stream import within
from mikv_vllm.kernels.triton.unpack import key_row_factor, low_keys, low_values, value_row_factor

RECORDS_AT_ONCE = tl.constexpr(4)
"""Low records of a program. It reads the header and the signs once for all of them."""


@kernel(
    counts=("num_high",),
    tables=("tiered_table",),
    specialized=(*NATIVE_STRIDES, "page_stride", "head_stride"),
    num_warps=8,
)
def restore_high_kernel(
    keys,
    values,
    native_page_stride,
    native_token_stride,
    native_head_stride,
    pages,
    page_stride,
    head_stride,
    tiered_table,
    num_high,
    LAYER: tl.constexpr,
):
    """Write 32 high tokens to native pages 0, 1, …. Grid ``(cdiv(num_high, 32), kv_heads)``.

    Args:
        keys, values: out, native keys and values; their strides are in elements.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    stream = Stream(pages + head * head_stride, page_stride, tiered_table)
    channel = tl.arange(0, LAYER.padded)
    token = block * 32 + tl.arange(0, 32)
    mask = token < num_high
    stored = tl.minimum(token, num_high - 1)
    k = read_high_keys(stream, stored, channel, keys.dtype.element_ty, LAYER)
    v = read_high_values(stream, stored, keys.dtype.element_ty, LAYER)
    strides = (native_page_stride, native_token_stride)
    store_native(keys + head * native_head_stride, strides, token, channel, k, mask, LAYER)
    store_native(values + head * native_head_stride, strides, token, channel, v, mask, LAYER)


@triton.jit
def record_keys(record, center, unit, rank, LAYER: tl.constexpr, FORMAT: tl.constexpr):
    """Dequantize the keys of a low record, float32 ``[32, padded]``.

    Rows are in :func:`~orders.token_order`, columns are ranks in :func:`~orders.channel_order`.

    Args:
        rank: rank of each column; center, unit: from the header, float32, for these ranks.
    """
    numbers = (
        low_keys(record, 0, LAYER.padded // BAND_CHANNELS, FORMAT).to(tl.float32)
        * key_row_factor(FORMAT)[:, None]
    )
    if FORMAT.keys_per_token:
        token = token_order()
        steps = decode_scale(load_bytes(record, FORMAT.key_scales, token))
        zeros = load_signed(record, FORMAT.key_scales, FORMAT.key_slices + token)
        keys = (numbers + zeros[:, None]) * steps[:, None] * unit[None, :]
    else:
        steps = load_bytes(record, FORMAT.key_scales, rank).to(tl.float32) * unit
        zeros = load_signed(record, FORMAT.key_scales, FORMAT.key_slices + rank) / KEY_ZERO_STEPS
        keys = (numbers + zeros[None, :]) * steps[None, :] + center[None, :]
    return keys


@triton.jit
def record_values(record, hadamard, hadamard_scale, LAYER: tl.constexpr, FORMAT: tl.constexpr):
    """Dequantize the values of a low record and rotate them back, float32 ``[32, padded]``.

    Rows are in :func:`~orders.token_order`.
    """
    GROUPS: tl.constexpr = FORMAT.value_groups
    CHANNELS: tl.constexpr = LAYER.padded // GROUPS
    channel = tl.arange(0, LAYER.padded)
    token = token_order()
    out = tl.full([32, LAYER.padded], 0, tl.float32)
    for g in tl.static_range(GROUPS):
        numbers = low_values(record, 4 * g, CHANNELS, LAYER, FORMAT).to(tl.float32)
        numbers *= value_row_factor(CHANNELS, FORMAT)[:, None]
        steps = decode_scale(load_bytes(record, FORMAT.value_scales, token + LOW_RECORD_TOKENS * g))
        byte = token + LOW_RECORD_TOKENS * (GROUPS + g)
        zeros = load_signed(record, FORMAT.value_scales, byte)
        rotated = (numbers + zeros[None, :]) * steps[None, :]
        row = CHANNELS * g + value_channel_order(CHANNELS)
        signs = tl.load(hadamard + row[:, None] * LAYER.padded + channel[None, :])
        out += dot_signs(tl.trans(rotated), signs)
    return out * hadamard_scale


@kernel(
    counts=("num_high", "num_low_records", "low_end_line"),
    tables=("tiered_table",),
    specialized=(*NATIVE_STRIDES, "page_stride", "head_stride"),
    num_warps=8,
)
def restore_low_kernel(
    keys,
    values,
    native_page_stride,
    native_token_stride,
    native_head_stride,
    pages,
    page_stride,
    head_stride,
    tiered_table,
    num_high,
    num_low_records,
    low_end_line,
    hadamard,
    hadamard_scale,
    LAYER: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Write low records to native pages, after the high tokens.

    Grid ``(cdiv(num_low_records, RECORDS_AT_ONCE), kv_heads)``. Arguments are as in
    :func:`restore_high_kernel` and ``write_low_kernel``.
    """
    head = tl.program_id(1)
    stream = Stream(pages + head * head_stride, page_stride, tiered_table)
    keys += head * native_head_stride
    values += head * native_head_stride
    strides = (native_page_stride, native_token_stride)
    channel = tl.arange(0, LAYER.padded)
    rank = within(channel_order(LAYER.padded), LAYER.padded, LAYER.head_dim)
    header = record_at(stream, low_end_line * 0, LAYER.header_lines, LAYER)
    center = load_fp16(header, 2 * (LAYER.header_centers + rank))
    unit = load_fp16(header, 2 * (LAYER.header_units + rank))
    key_channel = load_bytes(header, 0, LAYER.header_order + rank)
    # Ranks from head_dim on repeat the last rank, and are not stored.
    key_channel = tl.where(
        channel_order(LAYER.padded) < LAYER.head_dim, key_channel, LAYER.head_dim
    )
    first = tl.program_id(0) * RECORDS_AT_ONCE
    for index in range(first, tl.minimum(first + RECORDS_AT_ONCE, num_low_records)):
        record = record_at(
            stream, low_end_line - (num_low_records - index) * FORMAT.count, FORMAT.count, LAYER
        )
        token = num_high + index * LOW_RECORD_TOKENS + token_order()
        every = token >= 0
        k = record_keys(record, center, unit, rank, LAYER, FORMAT)
        store_native(keys, strides, token, key_channel, k, every, LAYER)
        v = record_values(record, hadamard, hadamard_scale, LAYER, FORMAT)
        store_native(values, strides, token, channel, v, every, LAYER)
