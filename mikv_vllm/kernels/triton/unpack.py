"""Unpacking of stored integers to fp16 operands of tensor cores.

A small integer in the lowest bits of an fp16 number is a subnormal number with the value
``integer * 2**-24``. Unpacking thus needs one mask for two integers, and tensor cores multiply
subnormal numbers exactly. Integers are also not shifted down to the lowest bits. The result of the
dot is multiplied by a factor per row instead: :func:`key_row_factor` and :func:`value_row_factor`.
"""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.constants import BAND_CHANNELS
from mikv_vllm.kernels.triton.dot import INTERPRETED
from mikv_vllm.kernels.triton.record import record_words
from mikv_vllm.kernels.triton.stream import within

SUBNORMAL = tl.constexpr(2.0**24)
"""Factor from the value of an fp16 number to the integer in its bits."""


@triton.jit
def as_halves(pairs):
    """Split each 32-bit word into its two fp16 numbers, on a new last axis."""
    if INTERPRETED:
        low = (pairs & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        # This takes no instruction. With shifts and masks, the compiler would split the work on
        # pairs into work on single numbers.
        low, high = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;",
            "=h,=h,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    return tl.join(low, high)


@triton.jit
def unpack_words(words, extra, step, MAIN: tl.constexpr, BITS: tl.constexpr, GAP: tl.constexpr):
    """Unpack one integer of every byte to an fp16 number ``integer * 2**(GAP * step - 24)``.

    Args:
        words: int32, words of the first plane.
        extra: words of the second plane, with the remaining bits; ignored if ``BITS == MAIN``.
        step: index of the integer in its byte.
        MAIN: bits per integer in the first plane; BITS: bits per integer in both planes.
        GAP: bits from an integer to the next in the result, at least ``MAIN``.

    Returns:
        ``[..., 2, 2]``: byte ``j + 2 * h`` of the word at ``[..., j, h]``.
    """
    words, extra = tl.expand_dims(words, -1), tl.expand_dims(extra, -1)
    step = tl.expand_dims(step, -1)
    eight = tl.arange(0, 2) * 8
    pairs = (words >> eight) << ((GAP - MAIN) * step)
    pairs &= (((1 << MAIN) - 1) * 0x00010001) << (GAP * step)
    if BITS > MAIN:
        REST: tl.constexpr = BITS - MAIN
        place = GAP * step + MAIN
        moved = (extra >> eight) << 8 >> (8 + REST * step - place)
        pairs |= moved & ((((1 << REST) - 1) * 0x00010001) << place)
    return as_halves(pairs)


@triton.jit
def key_words(record, line, row, quad, pair, BITS: tl.constexpr):
    """Load words of planes of bands, shifted so that the two tiles of a quad are in the lowest
    bits of every byte."""
    words = tl.load(record_words(record, line + quad * BITS // 4, row * 2 + pair))
    if BITS < 4:
        words = words >> (quad * 2 * BITS % 8)
    return words


@triton.jit
def run_keys(record, FIRST: tl.constexpr, COUNT: tl.constexpr, FORMAT: tl.constexpr):
    """Return :func:`low_keys` of bands with equal bits."""
    MAIN: tl.constexpr = FORMAT.band_mains[FIRST]
    BITS: tl.constexpr = FORMAT.band_bits[FIRST]
    step = tl.arange(0, COUNT)[:, None, None, None]
    row = tl.arange(0, 8)[None, :, None, None]
    quad = tl.arange(0, 4)[None, None, :, None]
    pair = tl.arange(0, 2)[None, None, None, :]
    half = tl.arange(0, 2)[:, None, None, None, None]
    line = FORMAT.band_lines[FIRST] + step * BITS
    words = key_words(record, line, row, quad, pair, MAIN)
    extra = words
    if BITS > MAIN:
        extra = key_words(record, line + MAIN, row, quad, pair, BITS - MAIN)
    numbers = unpack_words(words[None], extra[None], half, MAIN, BITS, FORMAT.key_gap)
    return tl.reshape(tl.permute(numbers, (0, 4, 2, 1, 5, 3, 6)), (32, BAND_CHANNELS * COUNT))


@triton.jit
def low_keys(record, FIRST: tl.constexpr, COUNT: tl.constexpr, FORMAT: tl.constexpr):
    """Unpack the keys of ``COUNT`` bands of a low record, from band ``FIRST`` on.

    Bands that do not exist repeat others.

    Returns:
        fp16 ``[32, BAND_CHANNELS * COUNT]``, the left operand of a dot. Row ``16a + 8b + c`` is
        token ``16a + 2c + b``; column ``16a + 8b + 2c + d`` is the channel with rank
        ``16a + 4c + 2d + b`` (:mod:`~mikv_vllm.kernels.triton.orders`). A thread of the tensor core
        then owns the words that it loads, provided that no operand comes from an 8-bit load. Rows
        must be multiplied by :func:`key_row_factor`.
    """
    # Prefetched words are in shared memory, grouped by thread. With at most 16 bytes per thread,
    # there are no bank conflicts.
    if COUNT <= 2 and FORMAT.band_bits[FIRST] == FORMAT.band_bits[FIRST + COUNT - 1]:
        keys = run_keys(record, FIRST, COUNT, FORMAT)
    else:
        HALF: tl.constexpr = COUNT // 2
        lower = low_keys(record, FIRST, HALF, FORMAT)
        upper = lower
        if FORMAT.band_bits[FIRST + HALF] > 0:
            upper = low_keys(record, FIRST + HALF, HALF, FORMAT)
        keys = beside(lower, upper)
    return keys


@triton.jit
def low_values(
    record, first_tile, CHANNELS: tl.constexpr, LAYER: tl.constexpr, FORMAT: tl.constexpr
):
    """Unpack the values of ``CHANNELS`` channels of a low record, from ``16 * first_tile`` on.

    Returns:
        fp16 ``[CHANNELS, 32]``, the left operand of a dot. Row ``16a + 8b + c`` is channel
        ``16a + 2c + b`` of those, and columns are tokens in the row order of :func:`low_keys`.
        Rows must be multiplied by :func:`value_row_factor`.
    """
    MAIN: tl.constexpr = FORMAT.value_main
    TILES: tl.constexpr = LAYER.head_dim // 16
    TAKEN: tl.constexpr = FORMAT.value_tiles_taken
    step = tl.arange(0, 2)[:, None, None, None, None]
    block = tl.arange(0, CHANNELS // 16 // TAKEN)[None, :, None, None, None]
    row = tl.arange(0, 8)[None, None, :, None, None]
    quad = tl.arange(0, 4)[None, None, None, :, None]
    pair = tl.arange(0, 2)[None, None, None, None, :]
    taken = tl.arange(0, TAKEN)[:, None, None, None, None, None]
    block = within(first_tile + block * TAKEN, LAYER.padded // 16, TILES)
    tile = (step * 4 + quad) * TILES + block
    words = tl.load(record_words(record, FORMAT.values + tile * MAIN // 8, row * 2 + pair))
    if TAKEN < 8 // MAIN:
        words = words >> (tile % (8 // MAIN) * MAIN)
    extra = words
    if FORMAT.value_bits > MAIN:
        line = FORMAT.values + LAYER.head_dim * MAIN // 16 + tile // 8
        extra = tl.load(record_words(record, line, row * 2 + pair)) >> (tile % 8)
    numbers = unpack_words(words[None], extra[None], taken, MAIN, FORMAT.value_bits, MAIN)
    return tl.reshape(tl.permute(numbers, (2, 0, 5, 3, 1, 6, 4, 7)), (CHANNELS, 32))


@triton.jit
def beside(lower, upper):
    """Concatenate two ``[rows, columns]`` along the columns."""
    ROWS: tl.constexpr = lower.shape[0]
    COLUMNS: tl.constexpr = lower.shape[1]
    return tl.reshape(tl.permute(tl.join(lower, upper), (0, 2, 1)), (ROWS, 2 * COLUMNS))


@triton.jit
def above(upper, lower):
    """Concatenate two ``[rows, columns]`` along the rows."""
    ROWS: tl.constexpr = lower.shape[0]
    COLUMNS: tl.constexpr = lower.shape[1]
    return tl.reshape(tl.permute(tl.join(upper, lower), (2, 0, 1)), (2 * ROWS, COLUMNS))


@triton.jit
def high_keys(records, FIRST: tl.constexpr, COUNT: tl.constexpr, LAYER: tl.constexpr):
    """Unpack 8-bit keys of two high records, ``16 * COUNT`` channels from ``16 * FIRST`` on.

    Args:
        records: both records, ``[2, 1, 1, 1]``.

    Returns:
        fp16 ``[32, 16 * COUNT]``, to be multiplied by :data:`SUBNORMAL`. Rows are tokens in the
        order of :func:`low_keys`, columns are channels in :func:`~orders.channel_order`.
    """
    # 16 channels at a time, for the reason given in low_keys.
    if COUNT > 1:
        HALF: tl.constexpr = COUNT // 2
        keys = beside(
            high_keys(records, FIRST, HALF, LAYER), high_keys(records, FIRST + HALF, HALF, LAYER)
        )
    else:
        row = tl.arange(0, 8)[None, :, None, None]
        quad = tl.arange(0, 4)[None, None, :, None]
        pair = tl.arange(0, 2)[None, None, None, :]
        tile = within(FIRST * 4 + quad, LAYER.padded // 4, LAYER.head_dim // 4)
        words = tl.load(record_words(records, tile, row * 2 + pair))
        numbers = unpack_words(words, words, tl.zeros_like(words), 8, 8, 8)
        keys = tl.reshape(tl.permute(numbers, (0, 3, 1, 4, 2, 5)), (32, 16))
    return keys


@triton.jit
def high_values(records, FIRST: tl.constexpr, COUNT: tl.constexpr, LAYER: tl.constexpr):
    """Unpack 8-bit values of two high records, arguments as in :func:`high_keys`.

    Returns:
        fp16 ``[16 * COUNT, 32]``, to be multiplied by :data:`SUBNORMAL`. Rows are channels and
        columns are tokens in the order of :func:`low_values`.
    """
    if COUNT > 1:
        HALF: tl.constexpr = COUNT // 2
        upper = high_values(records, FIRST, HALF, LAYER)
        values = above(upper, high_values(records, FIRST + HALF, HALF, LAYER))
    else:
        TILES: tl.constexpr = LAYER.head_dim // 16
        row = tl.arange(0, 8)[None, :, None, None]
        quad = tl.arange(0, 4)[None, None, :, None]
        pair = tl.arange(0, 2)[None, None, None, :]
        tile = LAYER.head_dim // 4 + quad * TILES + within(FIRST, LAYER.padded // 16, TILES)
        words = tl.load(record_words(records, tile, row * 2 + pair))
        numbers = unpack_words(words, words, tl.zeros_like(words), 8, 8, 8)
        values = tl.reshape(tl.permute(numbers, (3, 1, 0, 4, 2, 5)), (16, 32))
    return values


@triton.jit
def key_row_factor(FORMAT: tl.constexpr):
    """Factor of each row of :func:`low_keys` that yields the stored integers, ``[32]``."""
    return tl.where(tl.arange(0, 32) < 16, 1.0, 1.0 / (1 << FORMAT.key_gap)) * SUBNORMAL


@triton.jit
def value_row_factor(CHANNELS: tl.constexpr, FORMAT: tl.constexpr):
    """Factor of each row of :func:`low_values` that yields the stored integers, ``[CHANNELS]``."""
    step = tl.arange(0, CHANNELS) // 16 % FORMAT.value_tiles_taken
    return 1.0 / (1 << (FORMAT.value_main * step)).to(tl.float32) * SUBNORMAL
