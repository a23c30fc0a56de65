"""Device functions that write records."""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.quantize import quantize_high
from mikv_vllm.kernels.triton.stream import LINE_BYTES, byte_pointer


@triton.jit
def store_high(stream, keys, values, scores, tokens, mask, L: tl.constexpr):
    """Store high tokens.

    Args:
        keys, values: ``[n, padded]`` in the cache's dtype, 0 beyond the channels.
        scores: float32 ``[n]``; tokens: their places in the tier, ``[n]``.
        mask: which of them exist, ``[n]``.
    """
    channel = tl.arange(0, L.padded)[None, :]
    line = L.header_lines + tokens // 16 * L.group_lines
    slot = tokens % 16
    inside = mask[:, None] & (channel < L.head_dim)
    if L.high_bits == 16:
        byte = 2 * (L.head_dim * slot[:, None] + channel)
        at = byte_pointer(stream, line[:, None], byte, L)
        tl.store(at.to(tl.pointer_type(keys.dtype)), keys, mask=inside)
        at = byte_pointer(stream, line[:, None], L.high_values + byte, L)
        tl.store(at.to(tl.pointer_type(keys.dtype)), values, mask=inside)
    else:
        integers, scales = quantize_high(keys.to(tl.float32))
        byte = channel // 4 * LINE_BYTES + slot[:, None] * 4 + channel % 4
        at = byte_pointer(stream, line[:, None], byte, L)
        tl.store(at, integers.to(tl.uint8), mask=inside)
        at = byte_pointer(stream, line, L.high_key_scales + 2 * slot, L)
        tl.store(at.to(tl.pointer_type(tl.float16)), scales, mask=mask)
        integers, scales = quantize_high(values.to(tl.float32))
        tile = slot[:, None] // 4 * (L.head_dim // 16) + channel // 16
        byte = L.high_values + tile * LINE_BYTES + channel % 16 * 4 + slot[:, None] % 4
        at = byte_pointer(stream, line[:, None], byte, L)
        tl.store(at, integers.to(tl.uint8), mask=inside)
        at = byte_pointer(stream, line, L.high_value_scales + 2 * slot, L)
        tl.store(at.to(tl.pointer_type(tl.float16)), scales, mask=mask)
    at = byte_pointer(stream, line, L.high_scores + 4 * slot, L)
    tl.store(at.to(tl.pointer_type(tl.float32)), scores, mask=mask)


@triton.jit
def pack_plane(
    stream,
    line,
    integers,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    IS_KEY: tl.constexpr,
    L: tl.constexpr,
):
    """Write bits ``SHIFT`` to ``SHIFT + BITS`` of a chunk's integers as the plane at ``line``.

    Args:
        integers: uint8 pointer to ``[32, head_dim]``.
    """
    TILES: tl.constexpr = 32 * L.head_dim // 64
    LINES: tl.constexpr = TILES * BITS // 8
    i = tl.arange(0, L.padded // 2)[:, None]
    word = tl.arange(0, 16)[None, :]
    inside = (i < LINES) & (word < 16)
    words = tl.zeros([L.padded // 2, 16], tl.int32)
    for n in tl.static_range(8 // BITS):
        tile = i * (8 // BITS) + n
        for byte in tl.static_range(4):
            if IS_KEY:
                place = (tile % 2 * 16 + word) * L.head_dim + tile // 2 * 4 + byte
            else:
                token = tile // (L.head_dim // 16) * 4 + byte
                place = token * L.head_dim + tile % (L.head_dim // 16) * 16 + word
            number = tl.load(integers + place, mask=inside, other=0).to(tl.int32)
            words |= (number >> SHIFT & ((1 << BITS) - 1)) << (8 * byte + BITS * n)
    at = byte_pointer(stream, line + i, 4 * word, L).to(tl.pointer_type(tl.int32))
    tl.store(at, words, mask=inside)


@triton.jit
def pack_chunk(stream, line, keys, values, L: tl.constexpr, C: tl.constexpr):
    """Write the planes of the chunk at ``line``.

    Args:
        keys, values: uint8 pointers to integers ``[32, head_dim]``.
    """
    pack_plane(stream, line, keys, 0, C.key_main, True, L)
    if C.key_bits > C.key_main:
        extra = line + L.head_dim * C.key_main // 16
        pack_plane(stream, extra, keys, C.key_main, 1, True, L)
    line += C.values
    pack_plane(stream, line, values, 0, C.value_main, False, L)
    if C.value_bits > C.value_main:
        extra = line + L.head_dim * C.value_main // 16
        pack_plane(stream, extra, values, C.value_main, 1, False, L)
