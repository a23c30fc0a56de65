// Quantization of records, with the rounding of tiers/codec.py and tiers/key_codecs.py.
#pragma once

#include "packing.hpp"

namespace mikv::MIKV_ISA {

// An 8-bit scale is the upper bits of a positive float: 5 bits of exponent, rebased, and 3 bits of
// mantissa.
constexpr int kScaleOffset = (127 - kScaleBias) << 3;

// Rounds scales up to 8-bit scales.
inline I encode_scale(F scale) {
    const I code =
        sub_i(sar_i<20>(add_i(bits_of(scale), splat_i((1 << 20) - 1))), splat_i(kScaleOffset));
    return min_i(max_i(code, splat_i(0)), splat_i(255));
}

inline F decode_scale(I code) { return float_of(shl_i<20>(add_i(code, splat_i(kScaleOffset)))); }

// Smallest and largest of `count` vectors, by lane.
inline void bounds(const float* x, int count, int stride, F& low, F& high) {
    low = high = load(x);
    for (int i = 1; i < count; ++i) {
        const F v = load(x + i * stride);
        low = vmin(low, v);
        high = vmax(high, v);
    }
}

// The number that integer 0 stands for, in steps, if the grid is centred in a range.
inline F grid_start(F low, F high, F step, float top) {
    return sub(div(mul(add(low, high), splat(0.5f)), step), splat(top / 2));
}

// Quantization grid of 16 channels: key = step * (integer + offset).
struct KeyGrid {
    F step, offset;
};

// Chooses the grid of 16 channels for the keys of a low record: token t of channel l is
// x[t * stride + l], less its centre. Writes scales, as multiples of `unit`, and zero points.
inline KeyGrid key_grid(const float* x, int stride, int bits, F unit, uint8_t* scales,
                        uint8_t* zeros) {
    F low, high;
    bounds(x, kLowRecordTokens, stride, low, high);
    const float top = static_cast<float>((1 << bits) - 1);
    // The second term keeps the zero point in the range of int8 if the keys are far from the
    // centre.
    const F wanted = vmax(div(sub(high, low), splat(top + 2 * kChannelMargin)),
                          mul(vabs(low), splat(static_cast<float>(kKeyZeroSteps / 127.0))));
    const F scale = vmin(vmax(vceil(div(wanted, unit)), splat(1.0f)), splat(255.0f));
    const F step = mul(scale, unit);
    const F start = mul(grid_start(low, high, step, top), splat(kKeyZeroSteps));
    const F zero = vmin(vmax(round_even(start), splat(-128.0f)), splat(127.0f));
    store_u8(scales, to_int(scale));
    store_u8(zeros, to_int(zero));
    return {step, mul(zero, splat(1.0f / kKeyZeroSteps))};
}

inline F nearest_key(F x, F step, F offset, int bits) {
    const F top = splat(static_cast<float>((1 << bits) - 1));
    return vmin(vmax(round_even(sub(div(x, step), offset)), splat(0.0f)), top);
}

// Quantizes 16 tokens, each with one 8-bit scale: channel i of token l is x[i * stride + l]. Writes
// the scales and zero points of the 16 tokens, and the integers at integers[i * stride + l].
inline void quantize_tokens(const float* x, int count, int stride, int bits, uint8_t* scales,
                            uint8_t* zeros, uint8_t* integers) {
    F low, high;
    bounds(x, count, stride, low, high);
    const float top = static_cast<float>((1 << bits) - 1);
    // The second term keeps the zero point in the range of int8.
    const F wanted =
        vmax(div(sub(high, low), splat(top + 2 * kTokenMargin)), div(vabs(low), splat(127.0f)));
    const I code = encode_scale(wanted);
    const F scale = decode_scale(code);
    const F zero =
        vmin(vmax(round_even(grid_start(low, high, scale, top)), splat(-128.0f)), splat(127.0f));
    store_u8(scales, code);
    store_u8(zeros, to_int(zero));
    for (int i = 0; i < count; ++i) {
        const F v = sub(round_even(div(load(x + i * stride), scale)), zero);
        store_u8(integers + i * stride, to_int(vmin(vmax(v, splat(0.0f)), splat(top))));
    }
}

// Rotates 16 vectors by the block Hadamard matrix of tiers/codec.py: channel c of vector l is
// x[c * stride + l].
inline void rotate_columns(float* x, int head_dim, int stride) {
    const int size = head_dim & -head_dim;
    for (int half = 1; half < size; half *= 2) {
        for (int c = 0; c < head_dim; ++c) {
            if (c & half) continue;
            const F a = load(x + c * stride), b = load(x + (c + half) * stride);
            store(x + c * stride, add(a, b));
            store(x + (c + half) * stride, sub(a, b));
        }
    }
    const F norm = splat(1.0f / __builtin_sqrtf(static_cast<float>(size)));
    for (int c = 0; c < head_dim; ++c) store(x + c * stride, mul(load(x + c * stride), norm));
}

// Rotates one vector by the same matrix.
inline void rotate(float* x, int head_dim) {
    const int size = head_dim & -head_dim;
    for (int half = 1; half < size; half *= 2) {
        for (int start = 0; start < head_dim; start += 2 * half) {
            for (int c = start; c < start + half; ++c) {
                const float a = x[c], b = x[c + half];
                x[c] = a + b;
                x[c + half] = a - b;
            }
        }
    }
    const float norm = 1.0f / __builtin_sqrtf(static_cast<float>(size));
    for (int c = 0; c < head_dim; ++c) x[c] *= norm;
}

// Scratch for the quantization of one low record.
struct LowRecordScratch {
    static constexpr int size = kLowRecordTokens * kMaxHeadDim;
    alignas(64) float keys[size];           // [token][channel]
    alignas(64) float values[size];         // [channel][token]
    alignas(64) float keys_in_units[size];  // [channel][token]
    alignas(64) uint8_t integers[size];
    alignas(64) uint8_t tiles[size];
};

// Sorts the key channels by rank, and subtracts their centres.
inline void rank_keys(LowRecordScratch& s, int d, const KeyFrame& frame) {
    alignas(64) float center[kMaxHeadDim], x[kMaxHeadDim];
    for (int r = 0; r < d; r += 16) store(center + r, load_fp16(frame.center + r));
    for (int t = 0; t < kLowRecordTokens; ++t) {
        float* keys = s.keys + t * d;
        for (int c = 0; c < d; c += 16) store(x + c, load(keys + c));
        for (int r = 0; r < d; ++r) keys[r] = x[frame.order[r]] - center[r];
    }
}

// Quantizes ranked keys per channel: scales and zero points to `record`, integers to `s.tiles`.
inline void quantize_keys_per_channel(LowRecordScratch& s, const LowLayout& layout,
                                      const KeyFrame& frame, uint8_t* record) {
    const int d = layout.head_dim;
    for (int c = 0; c < d; c += kBandChannels) {
        const int bits = layout.band_bits(c / kBandChannels);
        const KeyGrid grid =
            key_grid(s.keys + c, d, bits, load_fp16(frame.unit + c), record + layout.key_scales + c,
                     record + layout.key_zeros + c);
        for (int t = 0; t < kLowRecordTokens; ++t) {
            const F integer = nearest_key(load(s.keys + t * d + c), grid.step, grid.offset, bits);
            store_u8(s.integers + t * d + c, to_int(integer));
        }
    }
    for (int quad = 0; quad < d / 4; ++quad) {
        for (int t = 0; t < kLowRecordTokens; ++t) {
            copy4(s.tiles + (2 * quad + t / 16) * kLine + t % 16 * 4,
                  s.integers + t * d + 4 * quad);
        }
    }
}

// Quantizes keys per token, after division by the units of their channels.
inline void quantize_keys_per_token(LowRecordScratch& s, const LowLayout& layout,
                                    const KeyFrame& frame, uint8_t* record) {
    const int d = layout.head_dim;
    alignas(64) float unit[kMaxHeadDim];
    for (int c = 0; c < d; c += 16) store(unit + c, load_fp16(frame.unit + c));
    for (int t = 0; t < kLowRecordTokens; ++t) {
        const float* key = s.keys + t * d;
        for (int c = 0; c < d; ++c) s.keys_in_units[c * kLowRecordTokens + t] = key[c] / unit[c];
    }
    for (int half = 0; half < kLowRecordTokens; half += 16) {
        quantize_tokens(s.keys_in_units + half, d, kLowRecordTokens, layout.band_bits(0),
                        record + layout.key_scales + half, record + layout.key_zeros + half,
                        s.integers + half);
    }
    for (int c = 0; c < d; ++c) {
        for (int t = 0; t < kLowRecordTokens; ++t) {
            const int at = (c / 4 * 2 + t / 16) * kLine + t % 16 * 4 + c % 4;
            s.tiles[at] = s.integers[c * kLowRecordTokens + t];
        }
    }
}

// Quantizes s.keys and s.values into `record`. Changes all of `s`.
inline void quantize_low_record(LowRecordScratch& s, const LowLayout& layout, const KeyFrame& frame,
                                uint8_t* record) {
    const int d = layout.head_dim, num_tiles = kLowRecordTokens * d / kLine;
    if (layout.keys_per_token()) {
        quantize_keys_per_token(s, layout, frame, record);
    } else {
        rank_keys(s, d, frame);
        quantize_keys_per_channel(s, layout, frame, record);
    }
    pack_keys(s.tiles, layout, record);

    const int value_groups = LowLayout::value_groups(d), channels = d / value_groups;
    for (int half = 0; half < kLowRecordTokens; half += 16) {
        rotate_columns(s.values + half, d, kLowRecordTokens);
        for (int g = 0; g < value_groups; ++g) {
            const int at = g * channels * kLowRecordTokens + half;
            const int scale = g * kLowRecordTokens + half;
            quantize_tokens(s.values + at, channels, kLowRecordTokens, layout.value_bits,
                            record + layout.value_scales + scale,
                            record + layout.value_zeros + scale, s.integers + at);
        }
    }
    for (int quad = 0; quad < kLowRecordTokens / 4; ++quad) {
        for (int c = 0; c < d; ++c) {
            copy4(s.tiles + (quad * (d / 16) + c / 16) * kLine + c % 16 * 4,
                  s.integers + c * kLowRecordTokens + 4 * quad);
        }
    }
    pack(s.tiles, layout.value_bits, num_tiles, record + layout.values);
}

// Dequantizes the keys of a low record from s.integers [token][rank] to s.keys.
inline void dequantize_keys(LowRecordScratch& s, const LowLayout& layout, const KeyFrame& frame,
                            const uint8_t* record) {
    const int d = layout.head_dim;
    const uint8_t *scales = record + layout.key_scales, *zeros = record + layout.key_zeros;
    // The first 32 scales and zero points as those of tokens; unused if keys have scales per
    // channel.
    alignas(64) float token_scale[kLowRecordTokens], token_zero[kLowRecordTokens], key[16];
    for (int t = 0; t < kLowRecordTokens; t += 16) {
        store(token_scale + t, decode_scale(load_u8(scales + t)));
        store(token_zero + t, to_float(load_s8(zeros + t)));
    }
    for (int r = 0; r < d; r += 16) {
        const F unit = load_fp16(frame.unit + r), center = load_fp16(frame.center + r);
        F step = unit, offset = splat(0.0f);
        if (!layout.keys_per_token()) {
            step = mul(to_float(load_u8(scales + r)), unit);
            offset = mul(to_float(load_s8(zeros + r)), splat(1.0f / kKeyZeroSteps));
        }
        for (int t = 0; t < kLowRecordTokens; ++t) {
            F number = add(to_float(load_u8(s.integers + t * d + r)), offset);
            if (layout.keys_per_token()) {
                number = mul(add(number, splat(token_zero[t])), splat(token_scale[t]));
            }
            store(key, fma(step, number, center));
            for (int i = 0; i < 16; ++i) s.keys[t * d + frame.order[r + i]] = key[i];
        }
    }
}

// Dequantizes a low record to s.keys and s.values; the inverse of quantize_low_record.
inline void dequantize_low_record(LowRecordScratch& s, const LowLayout& layout,
                                  const KeyFrame& frame, const uint8_t* record) {
    const int d = layout.head_dim, num_tiles = kLowRecordTokens * d / kLine;
    unpack_keys(record, layout, s.tiles);
    for (int quad = 0; quad < d / 4; ++quad) {
        for (int t = 0; t < kLowRecordTokens; ++t) {
            copy4(s.integers + t * d + 4 * quad,
                  s.tiles + (2 * quad + t / 16) * kLine + t % 16 * 4);
        }
    }
    dequantize_keys(s, layout, frame, record);

    unpack(record + layout.values, layout.value_bits, num_tiles, s.tiles);
    for (int quad = 0; quad < kLowRecordTokens / 4; ++quad) {
        for (int c = 0; c < d; ++c) {
            copy4(s.integers + c * kLowRecordTokens + 4 * quad,
                  s.tiles + (quad * (d / 16) + c / 16) * kLine + c % 16 * 4);
        }
    }
    const int channels = d / LowLayout::value_groups(d);
    for (int half = 0; half < kLowRecordTokens; half += 16) {
        for (int c = 0; c < d; ++c) {
            const int at = c / channels * kLowRecordTokens + half;
            const F scale = decode_scale(load_u8(record + layout.value_scales + at));
            const F zero = to_float(load_s8(record + layout.value_zeros + at));
            const F integer = to_float(load_u8(s.integers + c * kLowRecordTokens + half));
            store(s.values + c * kLowRecordTokens + half, mul(scale, add(integer, zero)));
        }
        rotate_columns(s.values + half, d, kLowRecordTokens);
    }
}

// Quantizes one token of the 8-bit high tier. Returns the bits of its fp16 scale.
inline uint16_t quantize_high(const float* x, int head_dim, uint8_t* integers) {
    F top = splat(0.0f);
    for (int c = 0; c < head_dim; c += 16) top = vmax(top, vabs(load(x + c)));
    const float wanted = largest(top) / 127.0f;
    alignas(64) uint16_t half[16];
    store_fp16(half, splat(wanted < 6.2e-5f ? 6.2e-5f : wanted));
    const F scale = load_fp16(half);
    for (int c = 0; c < head_dim; c += 16) {
        const F v = round_even(div(load(x + c), scale));
        const F bounded = vmin(vmax(v, splat(-127.0f)), splat(127.0f));
        store_u8(integers + c, add_i(to_int(bounded), splat_i(kHighOffset)));
    }
    return half[0];
}

}  // namespace mikv::MIKV_ISA
