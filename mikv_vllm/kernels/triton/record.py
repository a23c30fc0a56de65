"""Pipelined loads from one record of a stream, for device functions.

The block table is read once per record, not once per load.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.constants import LINE_BYTES, LINE_WORDS

STAGES = tl.constexpr(5)
"""Stages of the loops over records.

Loading the entries of the block table takes some of the stages. With fewer than 5, Triton uses a
single buffer: the loop fills it at the end of a block and waits for it at the start of the next.
"""


class Record(NamedTuple):
    """Position of a record, which is not longer than a page and thus lies in one page or two.

    Positions are counted in lines of the cache of a layer, in 32 bits: this keeps the address
    computation of each load cheap, and is enough for 128 GiB.
    """

    pages: object
    start: object
    """Position of the first line."""
    wrap: object
    """Number of lines up to the end of the page."""
    jump: object
    """Added to the position of the lines after the end of the page."""


@triton.jit
def record_at(stream, line, COUNT: tl.constexpr, LAYER: tl.constexpr):
    """Return the :class:`Record` of ``COUNT`` lines that starts at stream line ``line``."""
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
    # A multiplication instead of tl.where: with tl.where, Triton does not see that the words are
    # contiguous, and loads them one by one.
    line += record.start + (line >= record.wrap).to(tl.int32) * record.jump
    return record.pages + line.to(tl.int64) * LINE_WORDS + word


@triton.jit
def either(first, second, which):
    """Select record ``first`` where ``which`` is 0, and ``second`` where it is 1."""
    return Record(
        first.pages,
        first.start + which * (second.start - first.start),
        first.wrap + which * (second.wrap - first.wrap),
        first.jump + which * (second.jump - first.jump),
    )


@triton.jit
def load_bytes(record, line, byte):
    """Load bytes of the field that starts at line ``line`` of a record: int32, 0 to 255.

    They are loaded as words. With 8-bit loads, the compiler would arrange the operands of dots for
    8-bit numbers.
    """
    words = tl.load(record_words(record, line + byte // LINE_BYTES, byte % LINE_BYTES // 4))
    return words >> (byte % 4 * 8) & 0xFF


@triton.jit
def load_signed(record, line, byte):
    """Load bytes as :func:`load_bytes` does, but as signed numbers, float32, -128 to 127."""
    return (load_bytes(record, line, byte) ^ 0x80).to(tl.float32) - 128.0


@triton.jit
def small_fp16(numbers):
    """Convert integers from 0 to 1023 to fp16."""
    # 0x6400 is 1024 in fp16, where the last bit of the mantissa counts 1.
    return (numbers | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def load_fp16(record, byte):
    """Load the fp16 numbers at byte offset ``byte`` of a record, as float32.

    They are loaded as words, because loads of less than 4 bytes are not prefetched.
    """
    word = byte // 4
    words = tl.load(record_words(record, word // LINE_WORDS, word % LINE_WORDS))
    halves = (words >> (byte % 4 * 8)).to(tl.int16)
    return halves.to(tl.float16, bitcast=True).to(tl.float32)
