// Byte dot products with AMX tiles. Both bytes of all query heads are rows of one tile register, so
// the second byte costs no extra instruction. The tiles of a record are stored in the order that a
// tile product requires of its right operand.
#pragma once

#include "dot_operands.hpp"

namespace mikv::MIKV_ISA {

// Tile registers: 0-3 sums [2G, 16], 4 queries or weights [2G, 64 bytes], 5 keys or values
// [16, 64 bytes], 6 zero points [16, 4 bytes], 7 their sums [2G, 1].
class TileConfig {
  public:
    explicit TileConfig(int rows) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; ++tile) {
            config.row_bytes[tile] = tile < 6 ? 64 : 4;
            config.rows[tile] = static_cast<uint8_t>(tile == 5 || tile == 6 ? 16 : rows);
        }
        _tile_loadconfig(&config);
    }
    ~TileConfig() { _tile_release(); }
    TileConfig(const TileConfig&) = delete;
    TileConfig& operator=(const TileConfig&) = delete;
};

// Products of the queries with the keys and with the zero points of one low record.
template <int D, int G>
inline void low_key_tiles(const uint8_t* tiles, const uint8_t* zeros,
                          const QueryBytes<D, G>& queries, KeyProducts<G>& products) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(7);
    for (int c = 0; c < D; c += 64) {
        // The queries are zero for channels >= D, so the bytes of these channels do not matter.
        _tile_loadd(4, queries.high[0] + c, queries.stride);
        _tile_loadd(5, tiles + c / 2 * kLine, 2 * kLine);
        _tile_dpbsud(0, 4, 5);
        _tile_loadd(5, tiles + (c / 2 + 1) * kLine, 2 * kLine);
        _tile_dpbsud(1, 4, 5);
        _tile_loadd(6, zeros + c, 4);
        _tile_dpbssd(7, 4, 6);
    }
    _tile_stored(0, products.high[0][0], 2 * kLine);
    _tile_stored(1, products.high[0][1], 2 * kLine);
    _tile_stored(7, products.zero_high, 4);
}

// Products of the queries with the keys of one high record.
template <int D, int G>
inline void high_key_tiles(const uint8_t* tiles, const QueryBytes<D, G>& queries,
                           KeyProducts<G>& products) {
    _tile_zero(0);
    for (int c = 0; c < D; c += 64) {
        _tile_loadd(4, queries.high[0] + c, queries.stride);
        _tile_loadd(5, tiles + c / 4 * kLine, kLine);
        _tile_dpbsud(0, 4, 5);
    }
    _tile_stored(0, products.high[0][0], 2 * kLine);
}

// Sums of weights x values and weights x zero points over a block of the low tier. `zeros`: zero
// points [value_groups][block]. Weights must be set up to the next multiple of 64 tokens.
template <int D, int G>
inline void low_value_tiles(const uint8_t* tiles, const uint8_t* zeros, int tokens,
                            const WeightBytes<D, G>& weights, ValueSums<D, G>& sums) {
    constexpr int all = Shape<D>::channel_tiles, each = all / Shape<D>::value_groups;
    for (int v = 0; v < Shape<D>::value_groups; ++v) {
        const auto& of = weights.of[v];
        const auto pass = [&]<int Width, bool WithZeros>(int first) __attribute__((always_inline)) {
            _tile_zero(0);
            if constexpr (Width > 1) _tile_zero(1);
            if constexpr (Width > 2) _tile_zero(2);
            if constexpr (Width > 3) _tile_zero(3);
            if constexpr (WithZeros) _tile_zero(7);
            for (int t = 0; t < tokens; t += 64) {
                const uint8_t* from = tiles + (t / 4 * all + v * each + first) * kLine;
                _tile_loadd(4, of.high[0] + t, weights.stride);
                _tile_loadd(5, from, all * kLine);
                _tile_dpbuud(0, 4, 5);
                if constexpr (Width > 1) {
                    _tile_loadd(5, from + kLine, all * kLine);
                    _tile_dpbuud(1, 4, 5);
                }
                if constexpr (Width > 2) {
                    _tile_loadd(5, from + 2 * kLine, all * kLine);
                    _tile_dpbuud(2, 4, 5);
                }
                if constexpr (Width > 3) {
                    _tile_loadd(5, from + 3 * kLine, all * kLine);
                    _tile_dpbuud(3, 4, 5);
                }
                if constexpr (WithZeros) {
                    _tile_loadd(6, zeros + v * Shape<D>::block + t, 4);
                    _tile_dpbusd(7, 4, 6);
                }
            }
            int32_t* to = sums.high[0] + (v * each + first) * 16;
            _tile_stored(0, to, 4 * D);
            if constexpr (Width > 1) _tile_stored(1, to + 16, 4 * D);
            if constexpr (Width > 2) _tile_stored(2, to + 32, 4 * D);
            if constexpr (Width > 3) _tile_stored(3, to + 48, 4 * D);
            if constexpr (WithZeros) {
                int32_t zero_sums[2][G];
                _tile_stored(7, zero_sums, 4);
                for (int g = 0; g < G; ++g) {
                    sums.zero_high[v][g] = zero_sums[0][g];
                    sums.zero_low[v][g] = zero_sums[1][g];
                }
            }
        };
        pass.template operator()<4, true>(0);
        if constexpr (each > 4) pass.template operator()<each - 4, false>(4);
    }
}

}  // namespace mikv::MIKV_ISA
