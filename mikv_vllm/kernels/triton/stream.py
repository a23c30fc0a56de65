"""Device functions that find bytes in a request's stream and integers in its lines.

Pages are read as 32-bit words, 16 to a line. A word of a key tile holds 4 channels of one token, a
word of a value tile 4 tokens of one channel (:mod:`mikv_vllm.tiers.packing`).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.dot import INTERPRETED
from mikv_vllm.tiers.formats import BAND_CHANNELS as _BAND_CHANNELS
from mikv_vllm.tiers.formats import LINE_BYTES as _LINE_BYTES

LINE_BYTES = tl.constexpr(_LINE_BYTES)
LINE_WORDS = tl.constexpr(_LINE_BYTES // 4)
BAND = tl.constexpr(_BAND_CHANNELS)
SUBNORMAL = tl.constexpr(2.0**24)
"""What makes an fp16 number with an integer's bits that integer."""


@triton.jit
def line_pointer(stream, line, LAYER: tl.constexpr):
    """Pointer to the first word of each stream line.

    Args:
        stream: a :class:`~mikv_vllm.kernels.triton.layout.Stream`.
        line: stream lines, of any shape.
    """
    page = tl.load(stream.table + line // LAYER.page_lines).to(tl.int64)
    return stream.pages + page * stream.page_stride + (line % LAYER.page_lines) * LINE_WORDS


@triton.jit
def byte_pointer(stream, line, byte, LAYER: tl.constexpr):
    """uint8 pointer to a byte that lies ``byte`` bytes behind the start of ``line``."""
    start = line_pointer(stream, line + byte // LINE_BYTES, LAYER)
    return start.to(tl.pointer_type(tl.uint8)) + byte % LINE_BYTES


@triton.jit
def frame_pointers(stream, rank, LAYER: tl.constexpr):
    """Where the header keeps key centres and units (fp16) and channels (uint8) of some ranks."""
    half = tl.pointer_type(tl.float16)
    center = byte_pointer(stream, 0, 2 * rank, LAYER).to(half)
    unit = byte_pointer(stream, 0, 2 * (LAYER.head_dim + rank), LAYER).to(half)
    return center, unit, byte_pointer(stream, 0, 4 * LAYER.head_dim + rank, LAYER)


@triton.jit
def load_frame(stream, LAYER: tl.constexpr):
    """Key centres and units, float32, and channels by rank, ``[LAYER.padded]``; the last rank's
    beyond
    it."""
    rank = within(tl.arange(0, LAYER.padded), LAYER.padded, LAYER.head_dim)
    center, unit, channel = frame_pointers(stream, rank, LAYER)
    channel = tl.load(channel).to(tl.int32)
    return tl.load(center).to(tl.float32), tl.load(unit).to(tl.float32), channel


class Record(NamedTuple):
    """A record no longer than a page: it lies in one page or two.

    Places count lines of a layer's cache, 32-bit: cheap to work out for every load, and enough for
    128 GiB.
    """

    pages: object
    start: object
    """Where its first line is."""
    wrap: object
    """Lines until the page's end."""
    jump: object
    """Lines to add beyond it."""


@triton.jit
def record_at(stream, line, COUNT: tl.constexpr, LAYER: tl.constexpr):
    """The record of ``COUNT`` lines at ``line``."""
    line = line.to(tl.uint32)
    first = (line % LAYER.page_lines).to(tl.int32)
    page = tl.load(stream.table + line // LAYER.page_lines)
    last_page = tl.load(stream.table + (line + (COUNT - 1)) // LAYER.page_lines)
    stride = stream.page_stride // LINE_WORDS
    jump = (last_page - page) * stride - LAYER.page_lines
    return Record(stream.pages, page * stride + first, LAYER.page_lines - first, jump)


@triton.jit
def record_words(record, line, word):
    """Pointer to word ``word`` of line ``line`` of a record."""
    # Not tl.where: Triton would no longer know that words are neighbours, and load them one by one.
    line += record.start + (line >= record.wrap).to(tl.int32) * record.jump
    return record.pages + line.to(tl.int64) * LINE_WORDS + word


@triton.jit
def either(first, second, which):
    """Records ``first`` where ``which`` is 0, ``second`` where it is 1."""
    return Record(
        first.pages,
        first.start + which * (second.start - first.start),
        first.wrap + which * (second.wrap - first.wrap),
        first.jump + which * (second.jump - first.jump),
    )


@triton.jit
def load_bytes(record, line, byte):
    """Bytes 0 to 255 of a field that starts at a record's line, int32.

    They are read as words: 8-bit loads would have the compiler arrange dots for 8-bit operands.
    """
    words = tl.load(record_words(record, line + byte // LINE_BYTES, byte % LINE_BYTES // 4))
    return words >> (byte % 4 * 8) & 0xFF


@triton.jit
def load_signed(record, line, byte):
    """As :func:`load_bytes`, bytes -128 to 127 as float32."""
    return (load_bytes(record, line, byte) ^ 0x80).to(tl.float32) - 128.0


@triton.jit
def small_fp16(numbers):
    """Integers 0 to 1023 as fp16."""
    # 0x6400 is 1024, whose last bit counts 1.
    return (numbers | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def load_fp16(record, byte):
    """fp16 numbers ``byte`` bytes behind a record's start, as float32.

    They are read as words: loads of less than 4 bytes are not prefetched.
    """
    word = byte // 4
    words = tl.load(record_words(record, word // LINE_WORDS, word % LINE_WORDS))
    halves = (words >> (byte % 4 * 8)).to(tl.int16)
    return halves.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def as_halves(pairs):
    """Two fp16 numbers from each 32-bit word, on a new last axis."""
    if INTERPRETED:
        low = (pairs & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        # Costs nothing. Shifts and masks would let the compiler undo the work on pairs.
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
    """Integers of words as fp16 numbers ``n * 2**(GAP * step - 24)``.

    A small integer in the lowest bits of an fp16 number *is* a subnormal number: unpacking takes a
    mask for two of them, and tensor cores multiply subnormals exactly. Integers are not shifted
    down to the lowest bits either: what they are too large by is known for each row.

    Args:
        words: int32, of the first plane, whose integer number ``step`` of every byte is wanted.
        extra: of the plane of 1 or 2 bits, whose integer number ``step`` is; or anything.
        GAP: bits from an integer to the next, at least ``MAIN``.

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
def within(index, PADDED: tl.constexpr, COUNT: tl.constexpr):
    """Indices below ``PADDED``, those from ``COUNT`` on replaced by the last below it."""
    return index if PADDED == COUNT else tl.minimum(index, COUNT - 1)


@triton.jit
def key_words(record, line, row, quad, pair, BITS: tl.constexpr):
    """Words of planes of bands, shifted so that a quad's two tiles come first in every byte."""
    words = tl.load(record_words(record, line + quad * BITS // 4, row * 2 + pair))
    if BITS < 4:
        words = words >> (quad * 2 * BITS % 8)
    return words


@triton.jit
def run_keys(record, FIRST: tl.constexpr, COUNT: tl.constexpr, FORMAT: tl.constexpr):
    """:func:`low_keys` of bands that have the same bits."""
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
    return tl.reshape(tl.permute(numbers, (0, 4, 2, 1, 5, 3, 6)), (32, BAND * COUNT))


@triton.jit
def low_keys(record, FIRST: tl.constexpr, COUNT: tl.constexpr, FORMAT: tl.constexpr):
    """Keys of a chunk's bands ``FIRST`` to ``FIRST + COUNT`` as the left operand of a dot: fp16
    ``[32, BAND * COUNT]``.

    Rows are to be multiplied by :func:`key_row_factor`.
    Row ``16a + 8b + c`` is token ``16a + 2c + b``, column ``16a + 8b + 2c + d`` the channel of rank
    ``16a + 4c + 2d + b``: so a thread of the tensor core holds the words that it loads, if none of
    the operands' inputs is an 8-bit load. Bands that do not exist repeat others.
    """
    # Prefetched words lie in shared memory by thread: up to 16 bytes each, banks do not collide.
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
    """Values of a chunk as the left operand of a dot: fp16 ``[CHANNELS, 32]``.

    Rows are to be multiplied by :func:`value_row_factor`.
    Channels start at ``16 * first_tile``; row ``16a + 8b + c`` is channel ``16a + 2c + b`` from
    there, and columns are in the order of :func:`low_keys`'s rows.
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
    """``[rows, columns]`` twice, one right of the other."""
    ROWS: tl.constexpr = lower.shape[0]
    COLUMNS: tl.constexpr = lower.shape[1]
    return tl.reshape(tl.permute(tl.join(lower, upper), (0, 2, 1)), (ROWS, 2 * COLUMNS))


@triton.jit
def above(upper, lower):
    """``[rows, columns]`` twice, one above the other."""
    ROWS: tl.constexpr = lower.shape[0]
    COLUMNS: tl.constexpr = lower.shape[1]
    return tl.reshape(tl.permute(tl.join(upper, lower), (2, 0, 1)), (2 * ROWS, COLUMNS))


@triton.jit
def high_keys(records, FIRST: tl.constexpr, COUNT: tl.constexpr, LAYER: tl.constexpr):
    """8-bit keys of two groups, channels ``16 * FIRST`` and ``16 * COUNT`` from there: fp16
    ``[32, 16 * COUNT]``.

    Rows are in the order of :func:`low_keys`'s, columns in :func:`channel_order`.

    Args:
        records: the groups', ``[2, 1, 1, 1]``.
    """
    # 16 channels at a time, as in low_keys.
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
    """As :func:`high_keys`, values ``[16 * COUNT, 32]``, channels and tokens in the order of
    :func:`low_values`."""
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
    """What makes rows of :func:`low_keys` the integers stored, ``[32]``."""
    return tl.where(tl.arange(0, 32) < 16, 1.0, 1.0 / (1 << FORMAT.key_gap)) * SUBNORMAL


@triton.jit
def value_row_factor(CHANNELS: tl.constexpr, FORMAT: tl.constexpr):
    """What makes rows of :func:`low_values` the integers stored, ``[CHANNELS]``."""
    step = tl.arange(0, CHANNELS) // 16 % FORMAT.value_tiles_taken
    return 1.0 / (1 << (FORMAT.value_main * step)).to(tl.float32) * SUBNORMAL


@triton.jit
def token_order():
    """Token of each row of a block of 32, as :func:`low_keys` orders them."""
    row = tl.arange(0, 32)
    return row // 16 * 16 + row % 8 * 2 + row // 8 % 2


@triton.jit
def channel_order(PADDED: tl.constexpr):
    """Channel of each column of :func:`high_keys`, and rank of each of all bands' keys."""
    column = tl.arange(0, PADDED)
    return column // 16 * 16 + column // 2 % 4 * 4 + column % 2 * 2 + column // 8 % 2


@triton.jit
def value_channel_order(PADDED: tl.constexpr):
    """Channel of each row of :func:`low_values`."""
    row = tl.arange(0, PADDED)
    return row // 16 * 16 + row % 8 * 2 + row // 8 % 2
