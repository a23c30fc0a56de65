// Operands and results of the byte dot products of queries with keys, and of weights with values.
//
// A query or a weight is stored as a pair of bytes, high and low. One byte would cost accuracy; the
// second byte costs a second multiplication with keys or values that are already unpacked.
//
// D: head size. G: query heads that are computed together.
#pragma once

#include "layout.hpp"
#include "simd.hpp"

namespace mikv::MIKV_ISA {

template <int D> struct Shape {
    static constexpr int quads = D / 4;           // key tiles of 16 tokens
    static constexpr int channel_tiles = D / 16;  // value tiles of 4 tokens
    static constexpr int padded = (D + 63) / 64 * 64;
    static constexpr int value_groups = LowLayout::value_groups(D);
    static constexpr int value_group_channels = D / value_groups;
    // Low tokens in a block: their unpacked keys or values fit into the first-level cache.
    static constexpr int block = D < 96 ? 256 : D < 256 ? 128 : 64;
    static constexpr int block_low_records = block / kLowRecordTokens;
    static constexpr int block_high_records = block / kHighRecordTokens;
    // AMX tile products may read up to 32 tiles after the last one.
    static constexpr int tiles_bytes = block * D + 32 * kLine;
};

// G queries as pairs of bytes: G rows of high bytes, then G rows of low bytes.
template <int D, int G> struct QueryBytes {
    static constexpr int stride = Shape<D>::padded;
    alignas(64) uint8_t high[G][stride];
    alignas(64) uint8_t low[G][stride];
};

// G rows of weights as pairs of bytes, for each value group: the weights include the value scales.
template <int D, int G> struct WeightBytes {
    static constexpr int stride = Shape<D>::block;
    struct {
        alignas(64) uint8_t high[G][stride];
        alignas(64) uint8_t low[G][stride];
    } of[Shape<D>::value_groups];
};

// Products of the queries with the keys of one record, 2 x 16 tokens: high * 128 + low.
template <int G> struct KeyProducts {
    alignas(64) int32_t high[G][2][16];
    alignas(64) int32_t low[G][2][16];
    int32_t zero_high[G], zero_low[G];  // products with the zero points, with AMX only

    I at(int g, int half) const {
        return add_i(shl_i<7>(load_i(high[g][half])), load_i(low[g][half]));
    }
};

// Sums of weights x values for each query and channel: high * 256 + low.
template <int D, int G> struct ValueSums {
    alignas(64) int32_t high[G][D];
    alignas(64) int32_t low[G][D];
    int32_t zero_high[Shape<D>::value_groups][G];  // sums of weights x zero points, with AMX only
    int32_t zero_low[Shape<D>::value_groups][G];

    void clear() { __builtin_memset(this, 0, sizeof *this); }
};

}  // namespace mikv::MIKV_ISA
