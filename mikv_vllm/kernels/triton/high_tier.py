"""Reading, writing and moving of high tokens."""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.constants import HIGH_OFFSET, HIGH_RECORD_TOKENS, LINE_BYTES
from mikv_vllm.kernels.triton.quantize import quantize_high
from mikv_vllm.kernels.triton.stream import byte_pointer


@triton.jit
def high_pointers(stream, tokens, channel, DTYPE: tl.constexpr, LAYER: tl.constexpr):
    """Pointers ``[n, c]`` to keys and values of tokens ``[n]`` at channels ``[1, c]``.

    They point to bytes, or to ``DTYPE`` if high tokens have 16 bits.
    """
    line = (LAYER.header_lines + tokens // HIGH_RECORD_TOKENS * LAYER.high_record_lines)[:, None]
    slot = tokens[:, None] % HIGH_RECORD_TOKENS
    if LAYER.high_bits == 16:
        byte = 2 * (LAYER.head_dim * slot + channel)
        keys = byte_pointer(stream, line, byte, LAYER).to(tl.pointer_type(DTYPE))
        values = byte_pointer(stream, line, LAYER.high_values + byte, LAYER).to(
            tl.pointer_type(DTYPE)
        )
    else:
        byte = channel // 4 * LINE_BYTES + slot * 4 + channel % 4
        keys = byte_pointer(stream, line, byte, LAYER)
        tile = slot // 4 * (LAYER.head_dim // 16) + channel // 16
        byte = LAYER.high_values + tile * LINE_BYTES + channel % 16 * 4 + slot % 4
        values = byte_pointer(stream, line, byte, LAYER)
    return keys, values


@triton.jit
def scale_pointers(stream, tokens, LAYER: tl.constexpr):
    """Pointers to the fp16 scales of the keys and values of 8-bit high tokens."""
    line = LAYER.header_lines + tokens // HIGH_RECORD_TOKENS * LAYER.high_record_lines
    byte = 2 * (tokens % HIGH_RECORD_TOKENS)
    keys = byte_pointer(stream, line, LAYER.high_key_scales + byte, LAYER)
    values = byte_pointer(stream, line, LAYER.high_value_scales + byte, LAYER)
    return keys.to(tl.pointer_type(tl.float16)), values.to(tl.pointer_type(tl.float16))


@triton.jit
def score_pointers(stream, tokens, LAYER: tl.constexpr):
    """Pointers to the float32 scores of high tokens."""
    line = LAYER.header_lines + tokens // HIGH_RECORD_TOKENS * LAYER.high_record_lines
    at = byte_pointer(stream, line, LAYER.high_scores + 4 * (tokens % HIGH_RECORD_TOKENS), LAYER)
    return at.to(tl.pointer_type(tl.float32))


@triton.jit
def load_high(pointers, scale_at, mask, LAYER: tl.constexpr):
    """Load keys or values ``[n, c]`` of high tokens in float32, with 0 outside of ``mask``."""
    if LAYER.high_bits == 16:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    numbers = tl.load(pointers, mask=mask, other=HIGH_OFFSET).to(tl.float32) - HIGH_OFFSET
    return numbers * tl.load(scale_at).to(tl.float32)[:, None]


@triton.jit
def read_high_keys(stream, tokens, key_channel, DTYPE: tl.constexpr, LAYER: tl.constexpr):
    """Dequantize the keys of tokens ``[n]``.

    Args:
        key_channel: channel of each column, ``[padded]``.

    Returns:
        float32 ``[n, padded]``, with 0 from ``head_dim`` on.
    """
    inside = (tl.arange(0, LAYER.padded)[None, :] < LAYER.head_dim) & (tokens[:, None] >= 0)
    pointers, _ = high_pointers(stream, tokens, key_channel[None, :], DTYPE, LAYER)
    scale_at, _ = scale_pointers(stream, tokens, LAYER)
    return load_high(pointers, scale_at, inside, LAYER)


@triton.jit
def read_high_values(stream, tokens, DTYPE: tl.constexpr, LAYER: tl.constexpr):
    """Dequantize the values of tokens ``[n]``.

    Returns:
        float32 ``[n, padded]``, with 0 from ``head_dim`` on.
    """
    channel = tl.arange(0, LAYER.padded)[None, :]
    inside = (channel < LAYER.head_dim) & (tokens[:, None] >= 0)
    _, pointers = high_pointers(stream, tokens, channel, DTYPE, LAYER)
    _, scale_at = scale_pointers(stream, tokens, LAYER)
    return load_high(pointers, scale_at, inside, LAYER)


@triton.jit
def store_high(stream, keys, values, scores, tokens, mask, LAYER: tl.constexpr):
    """Quantize high tokens and store them.

    Args:
        keys, values: ``[n, padded]`` in the dtype of the cache, 0 from ``head_dim`` on.
        scores: float32 ``[n]``; tokens: positions in the high tier, ``[n]``.
        mask: which of them to store, ``[n]``.
    """
    channel = tl.arange(0, LAYER.padded)[None, :]
    inside = mask[:, None] & (channel < LAYER.head_dim)
    key_at, value_at = high_pointers(stream, tokens, channel, keys.dtype, LAYER)
    if LAYER.high_bits == 16:
        tl.store(key_at, keys, mask=inside)
        tl.store(value_at, values, mask=inside)
    else:
        key_scale_at, value_scale_at = scale_pointers(stream, tokens, LAYER)
        integers, scales = quantize_high(keys.to(tl.float32))
        tl.store(key_at, integers.to(tl.uint8), mask=inside)
        tl.store(key_scale_at, scales, mask=mask)
        integers, scales = quantize_high(values.to(tl.float32))
        tl.store(value_at, integers.to(tl.uint8), mask=inside)
        tl.store(value_scale_at, scales, mask=mask)
    tl.store(score_pointers(stream, tokens, LAYER), scores, mask=mask)


@triton.jit
def load_stored(stream, tokens, mask, DTYPE: tl.constexpr, LAYER: tl.constexpr):
    """Load tokens ``[n]`` as they are stored, for :func:`store_stored`."""
    channel = tl.arange(0, LAYER.padded)[None, :]
    inside = mask[:, None] & (channel < LAYER.head_dim)
    keys, values = high_pointers(stream, tokens, channel, DTYPE, LAYER)
    k, v = tl.load(keys, mask=inside), tl.load(values, mask=inside)
    if LAYER.high_bits == 16:
        return k, v
    key_scales, value_scales = scale_pointers(stream, tokens, LAYER)
    return k, v, tl.load(key_scales, mask=mask), tl.load(value_scales, mask=mask)


@triton.jit
def store_stored(stream, stored, tokens, mask, DTYPE: tl.constexpr, LAYER: tl.constexpr):
    """Store the result of :func:`load_stored` at other tokens, without quantizing again."""
    channel = tl.arange(0, LAYER.padded)[None, :]
    inside = mask[:, None] & (channel < LAYER.head_dim)
    keys, values = high_pointers(stream, tokens, channel, DTYPE, LAYER)
    tl.store(keys, stored[0], mask=inside)
    tl.store(values, stored[1], mask=inside)
    if LAYER.high_bits == 8:
        key_scales, value_scales = scale_pointers(stream, tokens, LAYER)
        tl.store(key_scales, stored[2], mask=mask)
        tl.store(value_scales, stored[3], mask=mask)


@triton.jit
def compact(stream, kept, first, count, DTYPE: tl.constexpr, LAYER: tl.constexpr):
    """Move the tokens that stay in the high tier to positions ``0 .. count - 1``.

    Args:
        kept: int32 pointer to the positions of the ``count`` tokens that stay, ascending.
        first: first position that does not stay; earlier tokens are not moved.
    """
    for start in range(first // HIGH_RECORD_TOKENS * HIGH_RECORD_TOKENS, count, HIGH_RECORD_TOKENS):
        to = start + tl.arange(0, HIGH_RECORD_TOKENS)
        mask = to < count
        source = tl.load(kept + to, mask=mask, other=0)
        stored = load_stored(stream, source, mask, DTYPE, LAYER)
        score = tl.load(score_pointers(stream, source, LAYER), mask=mask)
        tl.debug_barrier()
        store_stored(stream, stored, to, mask, DTYPE, LAYER)
        tl.store(score_pointers(stream, to, LAYER), score, mask=mask)
        tl.debug_barrier()
