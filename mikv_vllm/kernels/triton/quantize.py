"""The codecs of ``tiers/codec.py`` and ``tiers/key_codecs.py`` as device functions."""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.constants import (
    BAND_CHANNELS,
    CHANNEL_MARGIN,
    HIGH_OFFSET,
    KEY_ZERO_STEPS,
    SCALE_BIAS,
    TOKEN_MARGIN,
)

CODE_BIAS = tl.constexpr((127 - SCALE_BIAS.value) << 3)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def rint(x):
    """Round to the nearest integer, halves to even, as torch does. Requires ``|x| < 2**22``."""
    # 1.5 * 2**23: a sum with this number has no bits for a fraction.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def key_tops(rank, LAYER: tl.constexpr, FORMAT: tl.constexpr):
    """Largest integer of the keys of each rank, float32. Ranks from ``head_dim`` on use the last
    quarter."""
    quarter = tl.minimum(4 * (rank // BAND_CHANNELS) // LAYER.key_bands, 3)
    bits = FORMAT.key_code >> 4 * quarter & 0xF
    return ((1 << bits) - 1).to(tl.float32)


@triton.jit
def grid_start(low, high, steps, top):
    """See :func:`mikv_vllm.tiers.codec.grid_start`."""
    return tl.div_rn((low + high) * 0.5, steps) - top * 0.5


@triton.jit
def key_steps(low, high, unit, tops):
    """Return scales (1 to 255), steps and zero points of keys in ``[low, high]``, float32.

    Args:
        unit: units of the channels, float32.
        tops: largest integers, float32.
    """
    scale = tl.maximum(
        tl.div_rn(high - low, tops + 2 * CHANNEL_MARGIN), tl.abs(low) * (KEY_ZERO_STEPS / 127)
    )
    scales = clamp(tl.ceil(tl.div_rn(scale, unit)), 1.0, 255.0)
    steps = scales * unit
    ratio = clamp(grid_start(low, high, steps, tops) * KEY_ZERO_STEPS, -1000.0, 1000.0)
    return scales, steps, clamp(rint(ratio), -128.0, 127.0)


@triton.jit
def round_keys(x, steps, zeros, tops):
    """Return the integers of keys, float32."""
    ratio = tl.div_rn(x, steps) - zeros / KEY_ZERO_STEPS
    return rint(clamp(ratio, 0.0, tops))


@triton.jit
def quantize_keys(x, unit, LAYER: tl.constexpr, FORMAT: tl.constexpr):
    """Quantize the keys of a low record per channel, or per token if the format says so.

    Args:
        x: keys minus centres, float32 ``[32, padded]``, by rank.
        unit: units, float32 ``[padded]``, by rank.

    Returns:
        Integers, shaped like ``x``; scales as stored and zero points, ``[padded]`` (per channel) or
        ``[32]`` (per token).
    """
    rank = tl.arange(0, LAYER.padded)
    if FORMAT.keys_per_token:
        x = tl.div_rn(x, unit[None, :])
        integers, scales, zeros = quantize_tokens(x, rank < LAYER.head_dim, 1, FORMAT.band_bits[0])
        scales, zeros = tl.reshape(scales, [32]), tl.reshape(zeros, [32])
    else:
        tops = key_tops(rank, LAYER, FORMAT)
        scales, steps, zeros = key_steps(tl.min(x, 0), tl.max(x, 0), unit, tops)
        integers = round_keys(x, steps[None, :], zeros[None, :], tops[None, :])
    return integers, scales, zeros


@triton.jit
def decode_scale(codes):
    """Decode 8-bit scales: int32 to float32."""
    return ((codes + CODE_BIAS) << 20).to(tl.float32, bitcast=True)


@triton.jit
def quantize_tokens(x, inside, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """Quantize numbers per token and group of channels.

    Args:
        x: float32 ``[tokens, channels]``; inside: which channels exist, ``[channels]``.

    Returns:
        Integers, shaped like ``x``; 8-bit scales (int32) and zero points (float32),
        ``[tokens, GROUPS]`` each.
    """
    TOKENS: tl.constexpr = x.shape[0]
    CHANNELS: tl.constexpr = x.shape[1]
    top: tl.constexpr = (1 << BITS) - 1
    shape: tl.constexpr = (TOKENS, GROUPS, CHANNELS // GROUPS)
    grouped = tl.reshape(x, shape)
    mask = tl.reshape(inside, (1, GROUPS, CHANNELS // GROUPS))
    low = tl.min(tl.where(mask, grouped, INFINITY), 2)
    high = tl.max(tl.where(mask, grouped, -INFINITY), 2)
    range_steps: tl.constexpr = top + 2 * TOKEN_MARGIN
    scale = tl.maximum(tl.div_rn(high - low, range_steps), tl.div_rn(tl.abs(low), 127.0))
    codes = ((scale.to(tl.int32, bitcast=True) + ((1 << 20) - 1)) >> 20) - CODE_BIAS
    codes = tl.minimum(tl.maximum(codes, 0), 255)
    steps = decode_scale(codes)
    start = clamp(grid_start(low, high, steps, top * 1.0), -1000.0, 1000.0)
    zeros = clamp(rint(start), -128.0, 127.0)
    ratio = clamp(tl.div_rn(grouped, steps[:, :, None]), -1000.0, 1000.0)
    integers = clamp(rint(ratio) - zeros[:, :, None], 0.0, top * 1.0)
    return tl.reshape(integers, (TOKENS, CHANNELS)), codes, zeros


@triton.jit
def quantize_high(x):
    """Quantize ``[tokens, channels]`` to 8 bits.

    Returns:
        Integers plus :data:`HIGH_OFFSET`, float32, and scales, fp16 ``[tokens]``.
    """
    scales = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 1), 127.0), 6.2e-5).to(tl.float16)
    ratio = tl.div_rn(x, scales.to(tl.float32)[:, None])
    return rint(clamp(ratio, -127.0, 127.0)) + HIGH_OFFSET, scales
