// Byte dot products with vector instructions; dots_amx.hpp has those with AMX tiles.
#pragma once

#include "dot_operands.hpp"

namespace mikv::MIKV_ISA {

// Products of the queries with `Halves` x 16 keys. Low: keys of the low tier, of at most 6 bits.
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

// Adds the products of weights with 4 x `Quads` values to `sums`; `at` is the split_place of the
// first value's weight. Low: values of the low tier; otherwise they have kHighOffset added.
template <int D, int G, int Quads, bool Low>
inline void value_dots(const uint8_t* tiles, const WeightBytes<D, G>& weights, int at,
                       ValueSums<D, G>& sums) {
    constexpr int most = kAccumulators / (2 * G) > 0 ? kAccumulators / (2 * G) : 1;
    constexpr int all = Shape<D>::channel_tiles;
    // As few passes as the registers allow, of equal width.
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
                if constexpr (!Low) values[i] = xor_b(values[i], splat_b(kHighOffset));
            }
            for (int g = 0; g < G; ++g) {
                for (int i = 0; i < Width; ++i) {
                    const auto& of =
                        weights.of[Low ? (first + i) * 16 / Shape<D>::value_group_channels : 0];
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
