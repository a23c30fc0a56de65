"""How a low chunk's parts are written."""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.stream import byte_pointer


@triton.jit
def store_key_metadata(
    stream, line, channel, scales, zeros, mask, L: tl.constexpr, C: tl.constexpr
):
    """Store scales and zero points, float32, of channels of the chunk at ``line``."""
    at = byte_pointer(stream, line + C.key_scales, channel, L)
    tl.store(at, scales.to(tl.uint8), mask=mask)
    at = byte_pointer(stream, line + C.key_scales, L.head_dim + channel, L)
    tl.store(at, zeros.to(tl.int8).to(tl.uint8, bitcast=True), mask=mask)


@triton.jit
def store_value_metadata(stream, line, codes, zeros, L: tl.constexpr, C: tl.constexpr):
    """Store scale codes and zero points ``[32, groups]`` of the chunk at ``line``."""
    byte = 32 * tl.arange(0, C.value_groups)[None, :] + tl.arange(0, 32)[:, None]
    tl.store(byte_pointer(stream, line + C.value_scales, byte, L), codes.to(tl.uint8))
    at = byte_pointer(stream, line + C.value_scales, 32 * C.value_groups + byte, L)
    tl.store(at, zeros.to(tl.int8).to(tl.uint8, bitcast=True))


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
