// Byte dot products of queries with tiles of keys, and of weights with tiles of values.
//
// A query or a weight is a pair of bytes, high and low: one integer operand of 8 bits would cost
// accuracy, a pair costs a second multiplication on bytes that are already unpacked.
#pragma once

#include "layout.hpp"

namespace mikv::MIKV_ISA {

template <int D> struct Shape {
    static constexpr int quads = D / 4;           // tiles of a token half along the channels
    static constexpr int channel_tiles = D / 16;  // tiles of a token quad along the channels
    static constexpr int padded = (D + 63) / 64 * 64;
    static constexpr int value_groups = LowLayout::value_groups(D);
    static constexpr int group_channels = D / value_groups;
};

// products[g][half] += keys . query g, for 16 tokens a half; queries as split_signed writes them.
template <int D, int G, int Halves, bool Small>
inline void key_dots(const uint8_t* tiles, const uint8_t* query_high, const uint8_t* query_low,
                     I (&products)[G][Halves]) {
    I high[G][Halves], low[G][Halves];
    for (int g = 0; g < G; ++g) {
        for (int half = 0; half < Halves; ++half) high[g][half] = low[g][half] = splat_i(0);
    }
    const auto block = [&]<int Quads>(int first) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int quad = 0; quad < Quads; ++quad) {
            B keys[Halves];
            for (int half = 0; half < Halves; ++half) {
                keys[half] = load_b(tiles + ((first + quad) * Halves + half) * kLine);
            }
            for (int g = 0; g < G; ++g) {
                const int at = g * Shape<D>::padded + first * 4 + split_place(quad);
                for (int half = 0; half < Halves; ++half) {
                    high[g][half] = dot_keys<Small>(high[g][half], keys[half], query_high + at);
                    low[g][half] = dot_keys<Small>(low[g][half], keys[half], query_low + at);
                }
            }
        }
    };
    constexpr int whole = Shape<D>::quads / 16 * 16;
    for (int first = 0; first < whole; first += 16) block.template operator()<16>(first);
    if constexpr (Shape<D>::quads > whole) {
        block.template operator()<Shape<D>::quads - whole>(whole);
    }
    for (int g = 0; g < G; ++g) {
        for (int half = 0; half < Halves; ++half) {
            products[g][half] = add_i(shl_i<7>(high[g][half]), low[g][half]);
        }
    }
}

// Sums of weights x values, for each query and channel: high * 256 + low.
template <int D, int G> struct ValueSums {
    alignas(64) int32_t high[G][D];
    alignas(64) int32_t low[G][D];

    void clear() { __builtin_memset(this, 0, sizeof *this); }
};

// Adds the products of `Quads` token quads. `weights_*`: [value group][G][stride] bytes as
// split_unsigned writes them, `at` the first quad's place. High-tier tiles hold int8 + 128.
template <int D, int G, int Quads, bool Low>
inline void value_dots(const uint8_t* tiles, const uint8_t* weights_high,
                       const uint8_t* weights_low, int stride, ValueSums<D, G>& sums) {
    constexpr int most = kAccumulators / (2 * G) > 0 ? kAccumulators / (2 * G) : 1;
    constexpr int all = Shape<D>::channel_tiles;
    // As few passes as registers allow, of even width.
    constexpr int passes = (all + most - 1) / most, width = (all + passes - 1) / passes;
    const auto pass = [&]<int Width>(int first) __attribute__((always_inline)) {
        I high[G][Width], low[G][Width];
        for (int g = 0; g < G; ++g) {
            for (int i = 0; i < Width; ++i) {
                high[g][i] = load_i(sums.high[g] + (first + i) * 16);
                low[g][i] = load_i(sums.low[g] + (first + i) * 16);
            }
        }
#pragma GCC unroll 8
        for (int quad = 0; quad < Quads; ++quad) {
            B values[Width];
            for (int i = 0; i < Width; ++i) {
                values[i] = load_b(tiles + (quad * all + first + i) * kLine);
                if constexpr (!Low) values[i] = xor_b(values[i], splat_b(128));
            }
            for (int g = 0; g < G; ++g) {
                for (int i = 0; i < Width; ++i) {
                    const int slice = Low ? (first + i) * 16 / Shape<D>::group_channels : 0;
                    const int at = (slice * G + g) * stride + split_place(quad);
                    high[g][i] = dot_values<Low>(high[g][i], values[i], weights_high + at);
                    low[g][i] = dot_values<Low>(low[g][i], values[i], weights_low + at);
                }
            }
        }
        for (int g = 0; g < G; ++g) {
            for (int i = 0; i < Width; ++i) {
                store_i(sums.high[g] + (first + i) * 16, high[g][i]);
                store_i(sums.low[g] + (first + i) * 16, low[g][i]);
            }
        }
    };
    constexpr int whole = all / width * width;
    for (int first = 0; first < whole; first += width) pass.template operator()<width>(first);
    if constexpr (all > whole) pass.template operator()<all - whole>(whole);
}

}  // namespace mikv::MIKV_ISA
