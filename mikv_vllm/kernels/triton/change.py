"""Changes of the tails in a decode step, before attention: demote and append."""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.constants import LOW_RECORD_TOKENS
from mikv_vllm.kernels.triton.dot import dot_signs
from mikv_vllm.kernels.triton.high_tier import (
    compact,
    read_high_keys,
    read_high_values,
    score_pointers,
    store_high,
)
from mikv_vllm.kernels.triton.jit import kernel
from mikv_vllm.kernels.triton.layout import Stream
from mikv_vllm.kernels.triton.low_tier import write_low_record, write_low_values
from mikv_vllm.kernels.triton.row import load_row
from mikv_vllm.kernels.triton.select import split_tokens
from mikv_vllm.kernels.triton.stream import load_frame


@triton.jit
def demote(
    stream,
    high,
    line,
    hadamard,
    hadamard_scale,
    recent,
    scores,
    kept,
    victims,
    integers,
    DTYPE: tl.constexpr,
    LAYER: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Quantize the 32 high tokens with the lowest scores into a new low record.

    Args:
        high: number of high tokens; line: first line of the new record.
        scores, kept, victims, integers: scratch: float32 and int32 ``[high tokens]``, int32
            ``[32]``, uint8 ``[2, 32, head_dim]``.
    """
    lane = tl.arange(0, 256)
    for start in range(0, high, 256):
        token = start + lane
        at = score_pointers(stream, tl.minimum(token, high - 1), LAYER)
        tl.store(scores + token, tl.load(at), mask=token < high)
    tl.debug_barrier()
    split_tokens(scores, high, high - recent, LOW_RECORD_TOKENS, victims, kept, False)
    tl.debug_barrier()

    token = tl.load(victims + tl.arange(0, 32))
    channel = tl.arange(0, LAYER.padded)
    center, unit, key_channel = load_frame(stream, LAYER)
    values = read_high_values(stream, token, DTYPE, LAYER)
    signs = tl.load(hadamard + channel[:, None] * LAYER.padded + channel[None, :])
    rotated = dot_signs(values, signs) * hadamard_scale
    # Read after the product, which needs most registers.
    keys = read_high_keys(stream, token, key_channel, DTYPE, LAYER)
    tl.debug_barrier()

    first = tl.load(victims)
    # The new low record may use the freed bytes, so its keys and values are already in registers.
    compact(stream, kept, first, high - LOW_RECORD_TOKENS, DTYPE, LAYER)
    write_low_values(stream, line, rotated, integers, LAYER, FORMAT)
    write_low_record(stream, line, keys, center, unit, integers, LAYER, FORMAT)


@kernel(
    counts=("table_stride", "recent"),
    tables=("starts",),
    specialized=("page_stride", "head_stride", "scratch_stride"),
    num_warps=8,
)
def change_kernel(
    pages,
    page_stride,
    head_stride,
    rows,
    tables,
    table_stride,
    hadamard,
    hadamard_scale,
    recent,
    scores,
    order,
    starts,
    scratch_stride,
    integers,
    DTYPE: tl.constexpr,
    LAYER: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Demote, in the rows whose step says so.

    Grid ``(kv_heads, rows)``. Programs of rows with another low format return at once. Arguments
    are as in ``attend_kernel``, and:

    Args:
        recent: number of the newest tokens, which are never demoted.
        scores: scratch, float32 ``[kv_heads, scratch_stride]``; order: scratch, int32 of this
            shape. Each row uses the size of its high tier and 32 more.
        integers: scratch, uint8 ``[rows, kv_heads, 2, 32, head_dim]``.
        DTYPE: dtype of 16-bit high tokens.
    """
    head, index = tl.program_id(0), tl.program_id(1)
    row = load_row(rows, index)
    if (row.token < 0) | (row.key_code != FORMAT.key_code) | (row.value_bits != FORMAT.value_bits):
        return
    stream = Stream(pages + head * head_stride, page_stride, tables + index * table_stride)
    slot = (index * tl.num_programs(0) + head).to(tl.int64)
    place = head.to(tl.int64) * scratch_stride + tl.load(starts + index) + index * LOW_RECORD_TOKENS
    victims = order + place
    # What the loop hoists would occupy registers that its body needs.
    for i in tl.range(row.demoted_records, disable_licm=True):
        demote(
            stream,
            row.high_before - i * LOW_RECORD_TOKENS,
            row.low_end_line - (row.low_records_before + i + 1) * FORMAT.count,
            hadamard,
            hadamard_scale,
            recent,
            scores + place,
            victims + LOW_RECORD_TOKENS,
            victims,
            integers + slot * 64 * LAYER.head_dim,
            DTYPE,
            LAYER,
            FORMAT,
        )
        tl.debug_barrier()


@kernel(
    counts=("table_stride",),
    specialized=("page_stride", "head_stride", "k_stride", "v_stride"),
    num_warps=1,
)
def append_kernel(
    pages,
    page_stride,
    head_stride,
    rows,
    tables,
    table_stride,
    k,
    k_stride,
    v,
    v_stride,
    LAYER: tl.constexpr,
):
    """Store the new token of each request as the last high token of its tail.

    Grid ``(kv_heads, rows)``. Programs of other rows return at once.

    Args:
        k, v: ``[tokens, kv_heads, head_dim]``; k_stride, v_stride: elements per token.
    """
    head, index = tl.program_id(0), tl.program_id(1)
    row = load_row(rows, index)
    if (row.token < 0) | (row.blocks == 0):
        return
    stream = Stream(pages + head * head_stride, page_stride, tables + index * table_stride)
    channel = tl.arange(0, LAYER.padded)[None, :]
    inside = channel < LAYER.head_dim
    at = head * LAYER.head_dim + channel
    key = tl.load(k + row.token.to(tl.int64) * k_stride + at, mask=inside, other=0.0)
    value = tl.load(v + row.token.to(tl.int64) * v_stride + at, mask=inside, other=0.0)
    token = row.high_tokens - 1 + tl.arange(0, 1)
    store_high(stream, key, value, tl.zeros([1], tl.float32), token, token >= 0, LAYER)
