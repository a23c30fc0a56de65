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
    // Tokens that are worked on at once: their unpacked keys or values fit the first-level cache.
    static constexpr int block = D < 96 ? 256 : D < 256 ? 128 : 64;
    static constexpr int block_low_records = block / kLowRecordTokens, block_high_records = block / kHighRecordTokens;
    // Tile products may read a few tiles behind the last one.
    static constexpr int tiles_bytes = block * D + 32 * kLine;
};

// Query rows as pairs of bytes: G rows of high bytes, then G rows of low bytes.
template <int D, int G> struct QueryBytes {
    static constexpr int stride = Shape<D>::padded;
    alignas(64) uint8_t high[G][stride];
    alignas(64) uint8_t low[G][stride];
};

// Weight rows as pairs of bytes, for each group of channels with a scale of its own.
template <int D, int G> struct WeightBytes {
    static constexpr int stride = Shape<D>::block;
    struct {
        alignas(64) uint8_t high[G][stride];
        alignas(64) uint8_t low[G][stride];
    } of[Shape<D>::value_groups];
};

// Products of one record's keys with the queries: high * 128 + low, for 2 x 16 tokens.
template <int G> struct KeyProducts {
    alignas(64) int32_t high[G][2][16];
    alignas(64) int32_t low[G][2][16];
    int32_t zero_high[G], zero_low[G];  // products with the zero points; only from AMX

    I at(int g, int half) const {
        return add_i(shl_i<7>(load_i(high[g][half])), load_i(low[g][half]));
    }
};

// Sums of weights x values, for each query and channel: high * 256 + low.
template <int D, int G> struct ValueSums {
    alignas(64) int32_t high[G][D];
    alignas(64) int32_t low[G][D];
    int32_t zero_high[Shape<D>::value_groups][G];  // sums of weights x zeros; only from AMX
    int32_t zero_low[Shape<D>::value_groups][G];

    void clear() { __builtin_memset(this, 0, sizeof *this); }
};

// Products with `Halves` x 16 tokens.
template <int D, int G, int Halves, bool Low>
inline void key_dots(const uint8_t* tiles, const QueryBytes<D, G>& queries,
                     KeyProducts<G>& products) {
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
                const int at = first * 4 + split_place(quad);
                for (int half = 0; half < Halves; ++half) {
                    high[g][half] = dot_keys<Low>(high[g][half], keys[half], queries.high[g] + at);
                    low[g][half] = dot_keys<Low>(low[g][half], keys[half], queries.low[g] + at);
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
            store_i(products.high[g][half], high[g][half]);
            store_i(products.low[g][half], low[g][half]);
        }
    }
}

// Adds the products of `Quads` token quads; `at` is the first one's place in the weights.
// High-tier tiles hold int8 + 128.
template <int D, int G, int Quads, bool Low>
inline void value_dots(const uint8_t* tiles, const WeightBytes<D, G>& weights, int at,
                       ValueSums<D, G>& sums) {
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
                    const auto& of =
                        weights.of[Low ? (first + i) * 16 / Shape<D>::group_channels : 0];
                    const int place = at + split_place(quad);
                    high[g][i] = dot_values<Low>(high[g][i], values[i], of.high[g] + place);
                    low[g][i] = dot_values<Low>(low[g][i], values[i], of.low[g] + place);
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

#if defined(MIKV_USE_AMX)
#include "dots_amx.hpp"
#endif
