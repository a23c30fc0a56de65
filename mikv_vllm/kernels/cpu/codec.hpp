// Quantization, bit for bit as in tiers/codec.py.
#pragma once

#include "packing.hpp"

namespace mikv::MIKV_ISA {

constexpr int kScaleOffset = (127 - 22) << 3;

inline I encode_scale(F scale) {
    const I code = sub_i(sar_i<20>(add_i(bits_of(scale), splat_i((1 << 20) - 1))),
                         splat_i(kScaleOffset));
    return min_i(max_i(code, splat_i(0)), splat_i(255));
}

inline F decode_scale(I code) { return float_of(shl_i<20>(add_i(code, splat_i(kScaleOffset)))); }

inline void bounds(const float* x, int count, int stride, F& low, F& high) {
    low = high = load(x);
    for (int i = 1; i < count; ++i) {
        const F v = load(x + i * stride);
        low = vmin(low, v);
        high = vmax(high, v);
    }
}

// Where the integers of 16 channels lie: key = step * (integer + offset).
struct KeyGrid {
    F step, offset;
};

// Chooses the grid of a chunk of 16 channels of keys: token t of channel l is x[t * stride + l],
// centred. Writes the channels' scales in their units, and their zeros.
inline KeyGrid key_grid(const float* x, int stride, int bits, F unit, uint8_t* scales,
                        uint8_t* zeros) {
    F low, high;
    bounds(x, kChunk, stride, low, high);
    const float top = static_cast<float>((1 << bits) - 1);
    // The second term keeps the zero point within an int8 where a chunk lies far from the centre.
    const F wanted = vmax(div(sub(high, low), splat(top)),
                          mul(vabs(low), splat(static_cast<float>(kKeyZeroSteps / 127.0))));
    const F scale = vmin(vmax(vceil(div(wanted, unit)), splat(1.0f)), splat(255.0f));
    const F step = mul(scale, unit);
    const F zero = vmin(vmax(round_even(mul(div(low, step), splat(kKeyZeroSteps))), splat(-128.0f)),
                        splat(127.0f));
    store_u8(scales, to_int(scale));
    store_u8(zeros, to_int(zero));
    return {step, mul(zero, splat(1.0f / kKeyZeroSteps))};
}

inline F nearest_key(F x, F step, F offset, int bits) {
    const F top = splat(static_cast<float>((1 << bits) - 1));
    return vmin(vmax(round_even(sub(div(x, step), offset)), splat(0.0f)), top);
}

// Rounding of keys in which the errors of channels already rounded move the next one's target; see
// key_feedback in tiers/codec.py.
struct KeyFeedback {
    int32_t* order;   // [head_dim], channels as they are rounded
    float* weights;   // [head_dim][head_dim], of the earlier channels' errors in each one's target
    double* moment;   // [head_dim][head_dim], scratch

    static size_t bytes(int head_dim) {
        return static_cast<size_t>(head_dim) * (4 + 12 * head_dim) + 3 * kLine;
    }
    static KeyFeedback make(Arena& arena, int d) {
        const size_t size = static_cast<size_t>(d) * d;
        return {arena.take<int32_t>(d), arena.take<float>(size), arena.take<double>(size)};
    }

    // Queries: rows of `shared` heads, head_dim numbers each, one after the other. `units`: fp16.
    void find(const Rows& queries, int num_queries, int first_head, int shared, int dtype, int d,
              const uint16_t* units) const {
        second_moment(queries, num_queries, first_head, shared, dtype, d);
        alignas(64) float cost[256];
        for (int c = 0; c < d; c += 16) store(cost + c, load_fp16(units + c));
        for (int c = 0; c < d; ++c) {
            cost[c] = static_cast<float>(moment[c * d + c] * (double{cost[c]} * cost[c]));
        }
        order_by_cost(cost, d, order);
        factorize(d);
    }

  private:
    void second_moment(const Rows& queries, int num_queries, int first_head, int shared, int dtype,
                       int d) const {
        const size_t size = static_cast<size_t>(d) * d;
        for (size_t i = 0; i < size; ++i) moment[i] = 0;
        alignas(64) float x[256];
        for (int row = 0; row < num_queries * shared; ++row) {
            const uint16_t* q = queries.at(row / shared) +
                                (first_head + row % shared) * static_cast<int64_t>(d);
            for (int c = 0; c < d; c += 16) store(x + c, load_half(q + c, dtype));
            for (int i = 0; i < d; ++i) {
                double* to = moment + static_cast<size_t>(i) * d;
                for (int j = 0; j <= i; ++j) to[j] += double{x[i]} * double{x[j]};
            }
        }
        double mean = 0;
        for (int i = 0; i < d; ++i) {
            for (int j = 0; j <= i; ++j) {
                moment[i * d + j] /= num_queries * shared;
                moment[j * d + i] = moment[i * d + j];
            }
            mean += moment[i * d + i] / d;
        }
        const double damping = mean * kDamping > 1e-30 ? mean * kDamping : 1e-30;
        for (int c = 0; c < d; ++c) moment[c * d + c] += damping;
    }

    // moment = L D L', last channel of the order first. Column r of L, from the diagonal on, is
    // row r of the weights: what the channels before the r-th one weigh in its target.
    void factorize(int d) const {
        for (int r = d - 1; r >= 0; --r) {
            float* to = weights + static_cast<size_t>(r) * d;
            const double* row = moment + static_cast<size_t>(order[r]) * d;
            const double pivot = 1.0 / row[order[r]];
            for (int j = 0; j < r; ++j) to[j] = static_cast<float>(row[order[j]] * pivot);
            for (int j = r; j < d; ++j) to[j] = 0.0f;
            for (int i = 0; i < r; ++i) {
                double* other = moment + static_cast<size_t>(order[i]) * d;
                const double factor = other[order[r]] * pivot;
                for (int c = 0; c < d; ++c) other[c] -= factor * row[c];
            }
        }
    }

    static constexpr double kDamping = 1.0;
};

// Quantizes 16 slices of values: element i of slice l is x[i * stride + l]. Writes codes and zeros
// of the 16 slices, and integers at integers[i * stride + l].
inline void quantize_values(const float* x, int count, int stride, int bits, uint8_t* codes,
                     uint8_t* zeros, uint8_t* integers) {
    F low, high;
    bounds(x, count, stride, low, high);
    const float top = static_cast<float>((1 << bits) - 1);
    // The second term keeps the zero point within an int8.
    const F wanted = vmax(div(sub(high, low), splat(top)), div(vabs(low), splat(127.0f)));
    const I code = encode_scale(wanted);
    const F scale = decode_scale(code);
    const F zero = vmin(vmax(round_even(div(low, scale)), splat(-128.0f)), splat(127.0f));
    store_u8(codes, code);
    store_u8(zeros, to_int(zero));
    for (int i = 0; i < count; ++i) {
        const F v = sub(round_even(div(load(x + i * stride), scale)), zero);
        store_u8(integers + i * stride, to_int(vmin(vmax(v, splat(0.0f)), splat(top))));
    }
}

// Orthonormal Hadamard rotation, in blocks, of `head_dim` rows of 16 numbers: x[c * stride ..].
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

// The same rotation of one vector.
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

// Scratch of one chunk's quantization.
struct ChunkScratch {
    alignas(64) float keys[kChunk * 256];       // [token][channel], without the centre
    alignas(64) float errors[256 * kChunk];     // [channel as rounded][token]
    alignas(64) float values[256 * kChunk];     // [channel][token]
    alignas(64) uint8_t integers[kChunk * 256];
    alignas(64) uint8_t tiles[kChunk * 256];
};

// Integers of a chunk's keys, each channel's steps and offsets given.
inline void round_keys(ChunkScratch& s, int d, int bits, const float* steps, const float* offsets) {
    for (int c = 0; c < d; c += 16) {
        const F step = load(steps + c), offset = load(offsets + c);
        for (int t = 0; t < kChunk; ++t) {
            const int at = t * d + c;
            store_u8(s.integers + at, to_int(nearest_key(load(s.keys + at), step, offset, bits)));
        }
    }
}

inline void round_keys(ChunkScratch& s, int d, int bits, const float* steps, const float* offsets,
                       const KeyFeedback& feedback) {
    alignas(64) uint8_t rounded[kChunk];
    for (int r = 0; r < d; ++r) {
        const int c = feedback.order[r];
        const float* weights = feedback.weights + static_cast<size_t>(r) * d;
        float* x = s.errors + r * kChunk;
        for (int t = 0; t < kChunk; ++t) x[t] = s.keys[t * d + c];
        F target[kChunk / 16], odd[kChunk / 16];
        for (int i = 0; i < kChunk / 16; ++i) target[i] = load(x + 16 * i), odd[i] = splat(0.0f);
        // Two sums each, since an addition waits for the one before.
        int j = 0;
        for (; j + 1 < r; j += 2) {
            const float* errors = s.errors + j * kChunk;
            for (int i = 0; i < kChunk / 16; ++i) {
                target[i] = fma(splat(weights[j]), load(errors + 16 * i), target[i]);
                odd[i] = fma(splat(weights[j + 1]), load(errors + kChunk + 16 * i), odd[i]);
            }
        }
        const F step = splat(steps[c]), offset = splat(offsets[c]);
        for (int i = 0; i < kChunk / 16; ++i) {
            F sum = add(target[i], odd[i]);
            if (j < r) sum = fma(splat(weights[j]), load(s.errors + j * kChunk + 16 * i), sum);
            const F integer = nearest_key(sum, step, offset, bits);
            store_u8(rounded + 16 * i, to_int(integer));
            store(x + 16 * i, sub(load(x + 16 * i), mul(step, add(integer, offset))));
        }
        for (int t = 0; t < kChunk; ++t) s.integers[t * d + c] = rounded[t];
    }
}

// Quantizes the keys and values in `s` (values not yet rotated) into `record`. `units`: of the keys,
// fp16 [head_dim]. Without `feedback` every key goes to its nearest integer.
inline void quantize_chunk(ChunkScratch& s, const LowLayout& layout, const uint16_t* units,
                           const KeyFeedback* feedback, uint8_t* record) {
    const int d = layout.head_dim, num_tiles = kChunk * d / kLine;
    alignas(64) float steps[256], offsets[256];
    for (int c = 0; c < d; c += 16) {
        const KeyGrid grid =
            key_grid(s.keys + c, d, layout.key_bits, load_fp16(units + c),
                     record + layout.key_scales + c, record + layout.key_zeros + c);
        store(steps + c, grid.step);
        store(offsets + c, grid.offset);
    }
    if (feedback) {
        round_keys(s, d, layout.key_bits, steps, offsets, *feedback);
    } else {
        round_keys(s, d, layout.key_bits, steps, offsets);
    }
    for (int quad = 0; quad < d / 4; ++quad) {
        for (int t = 0; t < kChunk; ++t) {
            copy4(s.tiles + (2 * quad + t / 16) * kLine + t % 16 * 4, s.integers + t * d + 4 * quad);
        }
    }
    pack(s.tiles, layout.key_bits, num_tiles, record);

    const int groups = LowLayout::value_groups(d), channels = d / groups;
    for (int half = 0; half < kChunk; half += 16) {
        rotate_columns(s.values + half, d, kChunk);
        for (int g = 0; g < groups; ++g) {
            const int at = g * channels * kChunk + half;
            quantize_values(s.values + at, channels, kChunk, layout.value_bits,
                            record + layout.value_scales + g * kChunk + half,
                            record + layout.value_zeros + g * kChunk + half, s.integers + at);
        }
    }
    for (int quad = 0; quad < kChunk / 4; ++quad) {
        for (int c = 0; c < d; ++c) {
            copy4(s.tiles + (quad * (d / 16) + c / 16) * kLine + c % 16 * 4,
                  s.integers + c * kChunk + 4 * quad);
        }
    }
    pack(s.tiles, layout.value_bits, num_tiles, record + layout.values);
}

// One token's channels as int8 + 128; returns the fp16 scale's bits.
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
        store_u8(integers + c, add_i(to_int(bounded), splat_i(128)));
    }
    return half[0];
}

}  // namespace mikv::MIKV_ISA
