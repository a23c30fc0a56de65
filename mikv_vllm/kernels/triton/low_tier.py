"""Writing of low records."""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.quantize import quantize_keys, quantize_tokens
from mikv_vllm.kernels.triton.stream import byte_pointer


@triton.jit
def store_signed(stream, line, byte, numbers, mask, LAYER: tl.constexpr):
    """Store float32 numbers from -128 to 127 as bytes, at offset ``byte`` from ``line``."""
    at = byte_pointer(stream, line, byte, LAYER)
    tl.store(at, numbers.to(tl.int8).to(tl.uint8, bitcast=True), mask=mask)


@triton.jit
def write_low_values(stream, line, values, integers, LAYER: tl.constexpr, FORMAT: tl.constexpr):
    """Quantize the values of 32 tokens, and write their scales into the low record at ``line``.

    Args:
        values: rotated, float32 ``[32, padded]``.
        integers: scratch, uint8 ``[2, 32, head_dim]``; the second half is written.
    """
    row = tl.arange(0, 32)[:, None]
    channel = tl.arange(0, LAYER.padded)
    inside = channel < LAYER.head_dim
    place = integers + (32 + row) * LAYER.head_dim + channel[None, :]
    numbers, codes, zeros = quantize_tokens(values, inside, FORMAT.value_groups, FORMAT.value_bits)
    tl.store(place, numbers.to(tl.uint8), mask=inside[None, :])
    byte = 32 * tl.arange(0, FORMAT.value_groups)[None, :] + row
    tl.store(byte_pointer(stream, line + FORMAT.value_scales, byte, LAYER), codes.to(tl.uint8))
    store_signed(
        stream, line + FORMAT.value_scales, 32 * FORMAT.value_groups + byte, zeros, byte >= 0, LAYER
    )


@triton.jit
def write_low_record(
    stream, line, keys, center, unit, integers, LAYER: tl.constexpr, FORMAT: tl.constexpr
):
    """Quantize the keys of 32 tokens, and write the low record at ``line`` except for value scales.

    Call :func:`write_low_values` before it.

    Args:
        keys: ``[32, padded]``, by rank; center, unit: float32 ``[padded]``, from the header.
        integers: scratch, uint8 ``[2, 32, head_dim]``; the first half is written.
    """
    channel = tl.arange(0, LAYER.padded)
    inside = channel < LAYER.head_dim
    place = integers + tl.arange(0, 32)[:, None] * LAYER.head_dim + channel[None, :]
    x = keys.to(tl.float32) - center[None, :]
    numbers, scales, zeros = quantize_keys(x, unit, LAYER, FORMAT)
    tl.store(place, numbers.to(tl.uint8), mask=inside[None, :])
    entry = tl.arange(0, scales.shape[0])
    exists = entry < FORMAT.key_slices
    at = byte_pointer(stream, line + FORMAT.key_scales, entry, LAYER)
    tl.store(at, scales.to(tl.uint8), mask=exists)
    store_signed(stream, line + FORMAT.key_scales, FORMAT.key_slices + entry, zeros, exists, LAYER)

    tl.debug_barrier()
    for run in tl.static_range(len(FORMAT.band_runs)):
        pack_keys(stream, line, integers, run, LAYER, FORMAT)
    pack_values(stream, line + FORMAT.values, integers + 32 * LAYER.head_dim, LAYER, FORMAT)


@triton.jit
def pack_keys(stream, line, integers, RUN: tl.constexpr, LAYER: tl.constexpr, FORMAT: tl.constexpr):
    """Write the keys of a run of bands of the low record at ``line``.

    Args:
        integers: uint8 pointer to ``[32, head_dim]``.
        RUN: index in ``FORMAT.band_runs``.
    """
    FIRST: tl.constexpr = FORMAT.band_runs[RUN][0]
    COUNT: tl.constexpr = FORMAT.band_runs[RUN][1]
    MAIN: tl.constexpr = FORMAT.band_mains[FIRST]
    BITS: tl.constexpr = FORMAT.band_bits[FIRST]
    line += FORMAT.band_lines[FIRST]
    pack_plane(stream, line, integers, 0, MAIN, FIRST, COUNT, BITS, True, LAYER)
    if BITS > MAIN:
        extra = line + MAIN
        pack_plane(stream, extra, integers, MAIN, BITS - MAIN, FIRST, COUNT, BITS, True, LAYER)


@triton.jit
def pack_values(stream, line, integers, LAYER: tl.constexpr, FORMAT: tl.constexpr):
    """Write the values of a low record from ``line`` on.

    Args:
        integers: uint8 pointer to ``[32, head_dim]``.
    """
    MAIN: tl.constexpr = FORMAT.value_main
    BITS: tl.constexpr = FORMAT.value_bits
    pack_plane(stream, line, integers, 0, MAIN, 0, 1, 0, False, LAYER)
    if BITS > MAIN:
        extra = line + LAYER.head_dim * MAIN // 16
        pack_plane(stream, extra, integers, MAIN, BITS - MAIN, 0, 1, 0, False, LAYER)


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
    LAYER: tl.constexpr,
):
    """Write bits ``SHIFT`` to ``SHIFT + BITS`` of the integers of bands, as one plane per band.

    All values together are one band.

    Args:
        line: line of the plane of band ``FIRST``.
        integers: uint8 pointer to ``[32, head_dim]``.
        BANDS: number of bands.
        STRIDE: lines from the plane of one band to that of the next.
    """
    TILES: tl.constexpr = 8 if IS_KEY else LAYER.head_dim // 2
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
                place = (tile % 2 * 16 + word) * LAYER.head_dim + tile // 2 * 4 + byte
            else:
                token = tile // (LAYER.head_dim // 16) * 4 + byte
                place = token * LAYER.head_dim + tile % (LAYER.head_dim // 16) * 16 + word
            number = tl.load(integers + place, mask=inside, other=0).to(tl.int32)
            words |= (number >> SHIFT & ((1 << BITS) - 1)) << (8 * byte + BITS * n)
    to = line + i // LINES * STRIDE + i % LINES
    at = byte_pointer(stream, to, 4 * word, LAYER).to(tl.pointer_type(tl.int32))
    tl.store(at, words, mask=inside)
