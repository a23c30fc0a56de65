"""How a low chunk is written."""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.quantize import quantize_keys, quantize_tokens
from mikv_vllm.kernels.triton.stream import byte_pointer


@triton.jit
def store_signed(stream, line, byte, numbers, mask, L: tl.constexpr):
    """Store numbers -128 to 127, float32, ``byte`` bytes behind ``line``."""
    at = byte_pointer(stream, line, byte, L)
    tl.store(at, numbers.to(tl.int8).to(tl.uint8, bitcast=True), mask=mask)


@triton.jit
def write_chunk(
    stream, line, keys, center, unit, values, integers, L: tl.constexpr, C: tl.constexpr
):
    """Quantize 32 tokens into the chunk at ``line``.

    Args:
        keys: ``[32, padded]``, by rank; center, unit: float32 ``[padded]``, of the header.
        values: float32 ``[32, padded]``, rotated.
        integers: scratch, uint8 ``[2, 32, head_dim]``.
    """
    row = tl.arange(0, 32)[:, None]
    channel = tl.arange(0, L.padded)
    inside = channel < L.head_dim
    place = integers + row * L.head_dim + channel[None, :]

    x = keys.to(tl.float32) - center[None, :]
    numbers, scales, zeros = quantize_keys(x, unit, L, C)
    tl.store(place, numbers.to(tl.uint8), mask=inside[None, :])
    entry = tl.arange(0, scales.shape[0])
    exists = entry < C.key_slices
    at = byte_pointer(stream, line + C.key_scales, entry, L)
    tl.store(at, scales.to(tl.uint8), mask=exists)
    store_signed(stream, line + C.key_scales, C.key_slices + entry, zeros, exists, L)

    numbers, codes, zeros = quantize_tokens(values, inside, C.value_groups, C.value_bits)
    tl.store(place + 32 * L.head_dim, numbers.to(tl.uint8), mask=inside[None, :])
    byte = 32 * tl.arange(0, C.value_groups)[None, :] + row
    tl.store(byte_pointer(stream, line + C.value_scales, byte, L), codes.to(tl.uint8))
    store_signed(stream, line + C.value_scales, 32 * C.value_groups + byte, zeros, byte >= 0, L)

    tl.debug_barrier()
    for run in tl.static_range(len(C.band_runs)):
        pack_keys(stream, line, integers, run, L, C)
    pack_values(stream, line + C.values, integers + 32 * L.head_dim, L, C)


@triton.jit
def pack_keys(stream, line, integers, RUN: tl.constexpr, L: tl.constexpr, C: tl.constexpr):
    """Write a run of bands of the chunk at ``line``.

    Args:
        integers: uint8 pointer to ``[32, head_dim]``.
    """
    FIRST: tl.constexpr = C.band_runs[RUN][0]
    COUNT: tl.constexpr = C.band_runs[RUN][1]
    MAIN: tl.constexpr = C.band_mains[FIRST]
    BITS: tl.constexpr = C.band_bits[FIRST]
    line += C.band_lines[FIRST]
    pack_plane(stream, line, integers, 0, MAIN, FIRST, COUNT, BITS, True, L)
    if BITS > MAIN:
        extra = line + MAIN
        pack_plane(stream, extra, integers, MAIN, BITS - MAIN, FIRST, COUNT, BITS, True, L)


@triton.jit
def pack_values(stream, line, integers, L: tl.constexpr, C: tl.constexpr):
    """Write a chunk's values from ``line`` on; integers as in :func:`pack_keys`."""
    MAIN: tl.constexpr = C.value_main
    BITS: tl.constexpr = C.value_bits
    pack_plane(stream, line, integers, 0, MAIN, 0, 1, 0, False, L)
    if BITS > MAIN:
        extra = line + L.head_dim * MAIN // 16
        pack_plane(stream, extra, integers, MAIN, BITS - MAIN, 0, 1, 0, False, L)


@triton.jit
def pack_plane(
    stream,
    line,
    integers,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
    BANDS: tl.constexpr,
    STRIDE: tl.constexpr,
    IS_KEY: tl.constexpr,
    L: tl.constexpr,
):
    """Write bits ``SHIFT`` to ``SHIFT + BITS`` of some bands' integers as planes.

    Values are one band.

    Args:
        line: of the plane of band ``FIRST``.
        integers: uint8 pointer to ``[32, head_dim]``.
        BANDS: how many bands.
        STRIDE: lines from a band's plane to the next one's.
    """
    TILES: tl.constexpr = 8 if IS_KEY else L.head_dim // 2
    LINES: tl.constexpr = TILES * BITS // 8
    PADDED: tl.constexpr = triton.next_power_of_2(BANDS * LINES)
    i = tl.arange(0, PADDED)[:, None]
    word = tl.arange(0, 16)[None, :]
    inside = (i < BANDS * LINES) & (word < 16)
    words = tl.zeros([PADDED, 16], tl.int32)
    for n in tl.static_range(8 // BITS):
        tile = FIRST * TILES + i * (8 // BITS) + n
        for byte in tl.static_range(4):
            if IS_KEY:
                place = (tile % 2 * 16 + word) * L.head_dim + tile // 2 * 4 + byte
            else:
                token = tile // (L.head_dim // 16) * 4 + byte
                place = token * L.head_dim + tile % (L.head_dim // 16) * 16 + word
            number = tl.load(integers + place, mask=inside, other=0).to(tl.int32)
            words |= (number >> SHIFT & ((1 << BITS) - 1)) << (8 * byte + BITS * n)
    to = line + i // LINES * STRIDE + i % LINES
    at = byte_pointer(stream, to, 4 * word, L).to(tl.pointer_type(tl.int32))
    tl.store(at, words, mask=inside)
