"""Pointers to lines and bytes of a stream, for device functions.

Pages are addressed as 32-bit words, 16 per line. A word of a key tile holds 4 channels of one
token. A word of a value tile holds 4 tokens of one channel (:mod:`mikv_vllm.tiers.packing`).
"""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.constants import LINE_BYTES, LINE_WORDS


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
    """uint8 pointer to the byte at offset ``byte`` from the start of ``line``."""
    start = line_pointer(stream, line + byte // LINE_BYTES, LAYER)
    return start.to(tl.pointer_type(tl.uint8)) + byte % LINE_BYTES


@triton.jit
def frame_pointers(stream, rank, LAYER: tl.constexpr):
    """Pointers to the key centres and units (fp16) and the channels (uint8) of ranks."""
    half = tl.pointer_type(tl.float16)
    center = byte_pointer(stream, 0, 2 * (LAYER.header_centers + rank), LAYER).to(half)
    unit = byte_pointer(stream, 0, 2 * (LAYER.header_units + rank), LAYER).to(half)
    return center, unit, byte_pointer(stream, 0, LAYER.header_order + rank, LAYER)


@triton.jit
def load_frame(stream, LAYER: tl.constexpr):
    """Load key centres and units (float32) and channels (int32) by rank, ``[padded]`` each.

    Elements from ``head_dim`` on repeat the last rank.
    """
    rank = within(tl.arange(0, LAYER.padded), LAYER.padded, LAYER.head_dim)
    center, unit, channel = frame_pointers(stream, rank, LAYER)
    channel = tl.load(channel).to(tl.int32)
    return tl.load(center).to(tl.float32), tl.load(unit).to(tl.float32), channel


@triton.jit
def within(index, PADDED: tl.constexpr, COUNT: tl.constexpr):
    """Replace each index from ``COUNT`` to ``PADDED - 1`` by ``COUNT - 1``."""
    return index if PADDED == COUNT else tl.minimum(index, COUNT - 1)
