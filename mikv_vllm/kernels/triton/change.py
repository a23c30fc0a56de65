"""What a decode step changes before it attends: move chunks, demote, append the new token."""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.dot import dot_signs
from mikv_vllm.kernels.triton.layout import Stream
from mikv_vllm.kernels.triton.quantize import key_steps, quantize_values, round_keys
from mikv_vllm.kernels.triton.row import CHUNK, load_row
from mikv_vllm.kernels.triton.select import split_tokens
from mikv_vllm.kernels.triton.stream import LINE_BYTES, byte_pointer, line_pointer
from mikv_vllm.kernels.triton.write import pack_chunk, store_high

COPY_LINES = tl.constexpr(64)


@triton.jit
def copy_lines(stream, source, to, count, L: tl.constexpr):
    """Copy ``count`` lines of the stream to lines that do not overlap them."""
    word = tl.arange(0, 16)[None, :]
    for start in range(0, count, COPY_LINES):
        line = start + tl.arange(0, COPY_LINES)[:, None]
        mask = (line < count) & (word < 16)
        line = tl.minimum(line, count - 1)
        words = tl.load(line_pointer(stream, source + line, L) + word, mask=mask)
        tl.store(line_pointer(stream, to + line, L) + word, words, mask=mask)


@triton.jit
def high_pointers(stream, tokens, channel, L: tl.constexpr):
    """Bytes of high tokens' keys and values, ``[n, channels]``, 8-bit."""
    line = (L.header_lines + tokens // 16 * L.group_lines)[:, None]
    slot = tokens[:, None] % 16
    byte = channel // 4 * LINE_BYTES + slot * 4 + channel % 4
    keys = byte_pointer(stream, line, byte, L)
    tile = slot // 4 * (L.head_dim // 16) + channel // 16
    byte = L.high_values + tile * LINE_BYTES + channel % 16 * 4 + slot % 4
    return keys, byte_pointer(stream, line, byte, L)


@triton.jit
def high_pointers_16(stream, tokens, channel, L: tl.constexpr):
    """The same of 16-bit tokens."""
    line = (L.header_lines + tokens // 16 * L.group_lines)[:, None]
    byte = 2 * (L.head_dim * (tokens[:, None] % 16) + channel)
    return byte_pointer(stream, line, byte, L), byte_pointer(stream, line, L.high_values + byte, L)


@triton.jit
def high_field(stream, tokens, FIELD: tl.constexpr, SIZE: tl.constexpr, L: tl.constexpr):
    """Where a number of ``SIZE`` bytes of each high token lies."""
    line = L.header_lines + tokens // 16 * L.group_lines
    return byte_pointer(stream, line, FIELD + SIZE * (tokens % 16), L)


@triton.jit
def read_high(stream, tokens, DTYPE: tl.constexpr, L: tl.constexpr):
    """Keys and values of high tokens, dequantized, float32 ``[n, padded]``; 0 beyond the
    channels."""
    channel = tl.arange(0, L.padded)[None, :]
    inside = (channel < L.head_dim) & (tokens[:, None] >= 0)
    if L.high_bits == 16:
        keys, values = high_pointers_16(stream, tokens, channel, L)
        k = tl.load(keys.to(tl.pointer_type(DTYPE)), mask=inside, other=0.0).to(tl.float32)
        v = tl.load(values.to(tl.pointer_type(DTYPE)), mask=inside, other=0.0).to(tl.float32)
    else:
        keys, values = high_pointers(stream, tokens, channel, L)
        half = tl.pointer_type(tl.float16)
        scale = tl.load(high_field(stream, tokens, L.high_key_scales, 2, L).to(half))
        k = tl.load(keys, mask=inside, other=128).to(tl.float32) - 128.0
        k *= scale.to(tl.float32)[:, None]
        scale = tl.load(high_field(stream, tokens, L.high_value_scales, 2, L).to(half))
        v = tl.load(values, mask=inside, other=128).to(tl.float32) - 128.0
        v *= scale.to(tl.float32)[:, None]
    return k, v


@triton.jit
def compact(stream, kept, first, count, DTYPE: tl.constexpr, L: tl.constexpr):
    """Close the holes of the high tier; nothing is quantized again.

    Args:
        kept: int32 pointer to the places of the ``count`` tokens that stay, ascending; those before
            ``first`` stay where they are.
    """
    slot = tl.arange(0, 16)
    channel = tl.arange(0, L.padded)[None, :]
    for start in range(first // 16 * 16, count, 16):
        to = start + slot
        mask = to < count
        source = tl.load(kept + to, mask=mask, other=0)
        inside = mask[:, None] & (channel < L.head_dim)
        word = tl.pointer_type(tl.float32)
        score = tl.load(high_field(stream, source, L.high_scores, 4, L).to(word), mask=mask)
        if L.high_bits == 16:
            half = tl.pointer_type(DTYPE)
            keys, values = high_pointers_16(stream, source, channel, L)
            k = tl.load(keys.to(half), mask=inside)
            v = tl.load(values.to(half), mask=inside)
            tl.debug_barrier()
            keys, values = high_pointers_16(stream, to, channel, L)
            tl.store(keys.to(half), k, mask=inside)
            tl.store(values.to(half), v, mask=inside)
        else:
            half = tl.pointer_type(tl.int16)
            keys, values = high_pointers(stream, source, channel, L)
            k = tl.load(keys, mask=inside)
            v = tl.load(values, mask=inside)
            key_scale = tl.load(
                high_field(stream, source, L.high_key_scales, 2, L).to(half), mask=mask
            )
            value_scale = tl.load(
                high_field(stream, source, L.high_value_scales, 2, L).to(half), mask=mask
            )
            tl.debug_barrier()
            keys, values = high_pointers(stream, to, channel, L)
            tl.store(keys, k, mask=inside)
            tl.store(values, v, mask=inside)
            at = high_field(stream, to, L.high_key_scales, 2, L).to(half)
            tl.store(at, key_scale, mask=mask)
            at = high_field(stream, to, L.high_value_scales, 2, L).to(half)
            tl.store(at, value_scale, mask=mask)
        tl.store(high_field(stream, to, L.high_scores, 4, L).to(word), score, mask=mask)
        tl.debug_barrier()


@triton.jit
def demote(
    stream,
    row,
    hadamard,
    hadamard_scale,
    recent,
    scores,
    kept,
    victims,
    integers,
    DTYPE: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
):
    """Turn the 32 high tokens with the lowest scores into a chunk below the others.

    Args:
        scores, kept, victims, integers: scratch: float32 and int32 for every high token, int32
            ``[32]``, uint8 ``[2, 32, head_dim]``.
    """
    high = row.high_before
    lane = tl.arange(0, 256)
    word = tl.pointer_type(tl.float32)
    for start in range(0, high, 256):
        token = start + lane
        at = high_field(stream, tl.minimum(token, high - 1), L.high_scores, 4, L).to(word)
        tl.store(scores + token, tl.load(at), mask=token < high)
    tl.debug_barrier()
    split_tokens(scores, high, high - recent, CHUNK, victims, kept, False)
    tl.debug_barrier()

    token = tl.load(victims + tl.arange(0, 32))
    channel = tl.arange(0, L.padded)
    inside = channel < L.head_dim
    keys, values = read_high(stream, token, DTYPE, L)
    at = byte_pointer(stream, 0, 2 * tl.minimum(channel, L.head_dim - 1), L)
    center = tl.load(at.to(tl.pointer_type(tl.float16))).to(tl.float32)
    at = byte_pointer(stream, 0, 2 * (L.head_dim + tl.minimum(channel, L.head_dim - 1)), L)
    unit = tl.load(at.to(tl.pointer_type(tl.float16))).to(tl.float32)
    x = keys - center[None, :]
    scales, steps, zeros = key_steps(tl.min(x, 0), tl.max(x, 0), unit, C.key_bits)
    place = tl.arange(0, 32)[:, None] * L.head_dim + channel[None, :]
    numbers = round_keys(x, steps[None, :], zeros[None, :], C.key_bits)
    tl.store(integers + place, numbers.to(tl.uint8), mask=inside[None, :])
    signs = tl.load(hadamard + channel[:, None] * L.padded + channel[None, :])
    x = dot_signs(values, signs) * hadamard_scale
    numbers, codes, value_zeros = quantize_values(x, inside, C.value_groups, C.value_bits)
    value_integers = integers + 32 * L.head_dim
    tl.store(value_integers + place, numbers.to(tl.uint8), mask=inside[None, :])
    tl.debug_barrier()

    first = tl.load(victims)
    compact(stream, kept, first, high - CHUNK, DTYPE, L)
    line = row.low_end - row.low_chunks * C.count
    pack_chunk(stream, line, integers, value_integers, L, C)
    at = byte_pointer(stream, line + C.key_scales, channel, L)
    tl.store(at, scales.to(tl.uint8), mask=inside)
    at = byte_pointer(stream, line + C.key_scales, L.head_dim + channel, L)
    tl.store(at, zeros.to(tl.int8).to(tl.uint8, bitcast=True), mask=inside)
    group = tl.arange(0, C.value_groups)[None, :]
    byte = 32 * group + tl.arange(0, 32)[:, None]
    at = byte_pointer(stream, line + C.value_scales, byte, L)
    tl.store(at, codes.to(tl.uint8))
    at = byte_pointer(stream, line + C.value_scales, 32 * C.value_groups + byte, L)
    tl.store(at, value_zeros.to(tl.int8).to(tl.uint8, bitcast=True))
    tl.debug_barrier()


@triton.jit
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
    capacity,
    integers,
    DTYPE: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
):
    """Move chunks and demote, where the plan says so.

    Grid ``(kv_heads, rows)``. Arguments as in ``attend_kernel``, and:

    Args:
        recent: newest tokens that are never demoted.
        scores: scratch, float32 ``[rows, kv_heads, capacity]``; ``order``: int32, as much and 32
                more for each head; ``integers``: uint8 ``[rows, kv_heads, 2, 32, head_dim]``.
        DTYPE: of 16-bit high tokens.
    """
    head, index = tl.program_id(0), tl.program_id(1)
    row = load_row(rows, index)
    if (row.token < 0) | (row.key_bits != C.key_bits) | (row.value_bits != C.value_bits):
        return
    stream = Stream(pages + head * head_stride, page_stride, tables + index * table_stride)
    slot = (index * tl.num_programs(0) + head).to(tl.int64)
    for i in range(row.moved_chunks):
        source = row.low_end_before + (i - row.chunks_before) * C.count
        copy_lines(stream, source, row.low_end_before + i * C.count, C.count, L)
    if row.demoted_chunks > 0:
        tl.debug_barrier()
        kept = order + slot * (capacity + CHUNK)
        demote(
            stream,
            row,
            hadamard,
            hadamard_scale,
            recent,
            scores + slot * capacity,
            kept,
            kept + capacity,
            integers + slot * 64 * L.head_dim,
            DTYPE,
            L,
            C,
        )


@triton.jit
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
    L: tl.constexpr,
):
    """Store the new token as the last high one. Grid ``(kv_heads, rows)``.

    Args:
        k, v: ``[tokens, kv_heads, head_dim]``, rows ``k_stride`` and ``v_stride`` apart.
    """
    head, index = tl.program_id(0), tl.program_id(1)
    row = load_row(rows, index)
    if row.token < 0:
        return
    stream = Stream(pages + head * head_stride, page_stride, tables + index * table_stride)
    channel = tl.arange(0, L.padded)[None, :]
    inside = channel < L.head_dim
    at = head * L.head_dim + channel
    key = tl.load(k + row.token.to(tl.int64) * k_stride + at, mask=inside, other=0.0)
    value = tl.load(v + row.token.to(tl.int64) * v_stride + at, mask=inside, other=0.0)
    token = row.high_tokens - 1 + tl.arange(0, 1)
    store_high(stream, key, value, tl.zeros([1], tl.float32), token, token >= 0, L)
