// Packing and unpacking of tiles in bit planes, as in tiers/packing.py. Unpacked tiles have one
// byte per number.
#pragma once

#include <utility>

#include "layout.hpp"
#include "simd.hpp"

namespace mikv::MIKV_ISA {

// Unpacks tiles of `Bits` bits; num_tiles is a multiple of 8.
template <int Bits> inline void unpack(const uint8_t* packed, int num_tiles, uint8_t* tiles) {
    if constexpr (8 % Bits == 0) {
        constexpr int kTiles = 8 / Bits;  // tiles of a line
        const B mask = splat_b((1 << Bits) - 1);
        for (int i = 0; i < num_tiles; i += kTiles, packed += kLine, tiles += kTiles * kLine) {
            const B line = load_b(packed);
            const auto store = [&]<int... Tile>(std::integer_sequence<int, Tile...>) {
                (store_b(tiles + Tile * kLine, and_b(shr_b<Tile * Bits>(line), mask)), ...);
            };
            store(std::make_integer_sequence<int, kTiles>{});
        }
    } else if constexpr (Bits == 5) {
        const uint8_t* top = packed + num_tiles / 2 * kLine;
        const B mask = splat_b(15), bit = splat_b(16);
        for (int i = 0; i < num_tiles; i += 8, packed += 4 * kLine, top += kLine) {
            const B high = load_b(top);
            const auto tiles_of = [&](int line, B even, B odd) {
                const B low = load_b(packed + line * kLine);
                store_b(tiles, or_b(and_b(low, mask), and_b(even, bit)));
                store_b(tiles + kLine, or_b(and_b(shr_b<4>(low), mask), and_b(odd, bit)));
                tiles += 2 * kLine;
            };
            tiles_of(0, shl_b<4>(high), shl_b<3>(high));
            tiles_of(1, shl_b<2>(high), shl_b<1>(high));
            tiles_of(2, high, shr_b<1>(high));
            tiles_of(3, shr_b<2>(high), shr_b<3>(high));
        }
    } else if constexpr (Bits == 6) {
        const uint8_t* top = packed + num_tiles / 2 * kLine;
        const B mask = splat_b(15), bits = splat_b(48);
        for (int i = 0; i < num_tiles; i += 4, packed += 2 * kLine, top += kLine) {
            const B first = load_b(packed), second = load_b(packed + kLine), high = load_b(top);
            const auto tile = [&](B low, B rest) {
                store_b(tiles, or_b(and_b(low, mask), and_b(rest, bits)));
                tiles += kLine;
            };
            tile(first, shl_b<4>(high));
            tile(shr_b<4>(first), shl_b<2>(high));
            tile(second, high);
            tile(shr_b<4>(second), shr_b<2>(high));
        }
    } else {
        static_assert(Bits == 3);
        const uint8_t* top = packed + num_tiles / 4 * kLine;
        const B mask = splat_b(3), bit = splat_b(4);
        for (int i = 0; i < num_tiles; i += 8, packed += 2 * kLine, top += kLine) {
            const B first = load_b(packed), second = load_b(packed + kLine), high = load_b(top);
            const auto tile = [&](B low, B third) {
                store_b(tiles, or_b(and_b(low, mask), and_b(third, bit)));
                tiles += kLine;
            };
            tile(first, shl_b<2>(high));
            tile(shr_b<2>(first), shl_b<1>(high));
            tile(shr_b<4>(first), high);
            tile(shr_b<6>(first), shr_b<1>(high));
            tile(second, shr_b<2>(high));
            tile(shr_b<2>(second), shr_b<3>(high));
            tile(shr_b<4>(second), shr_b<4>(high));
            tile(shr_b<6>(second), shr_b<5>(high));
        }
    }
}

inline void unpack(const uint8_t* packed, int bits, int num_tiles, uint8_t* tiles) {
    switch (bits) {
        case 1: return unpack<1>(packed, num_tiles, tiles);
        case 2: return unpack<2>(packed, num_tiles, tiles);
        case 3: return unpack<3>(packed, num_tiles, tiles);
        case 5: return unpack<5>(packed, num_tiles, tiles);
        case 6: return unpack<6>(packed, num_tiles, tiles);
        default: return unpack<4>(packed, num_tiles, tiles);
    }
}

// Packs bits Shift .. Shift + Plane - 1 of every number as one plane. Returns the end of the plane.
template <int Plane, int Shift>
inline uint8_t* pack_plane(const uint8_t* tiles, int num_tiles, uint8_t* packed) {
    const B mask = splat_b((1 << Plane) - 1);
    for (int i = 0; i < num_tiles; i += 8 / Plane, packed += kLine) {
        const auto part = [&](int j) {
            return and_b(shr_b<Shift>(load_b(tiles + (i + j) * kLine)), mask);
        };
        B line = part(0);
        if constexpr (Plane == 4) {
            line = or_b(line, shl_b<4>(part(1)));
        } else if constexpr (Plane == 2) {
            line = or_b(or_b(line, shl_b<2>(part(1))), or_b(shl_b<4>(part(2)), shl_b<6>(part(3))));
        } else {
            line = or_b(or_b(line, shl_b<1>(part(1))), or_b(shl_b<2>(part(2)), shl_b<3>(part(3))));
            line = or_b(line, or_b(or_b(shl_b<4>(part(4)), shl_b<5>(part(5))),
                                   or_b(shl_b<6>(part(6)), shl_b<7>(part(7)))));
        }
        store_b(packed, line);
    }
    return packed;
}

inline void pack(const uint8_t* tiles, int bits, int num_tiles, uint8_t* packed) {
    if (bits >= 4) {
        packed = pack_plane<4, 0>(tiles, num_tiles, packed);
        if (bits == 5) pack_plane<1, 4>(tiles, num_tiles, packed);
        if (bits == 6) pack_plane<2, 4>(tiles, num_tiles, packed);
    } else if (bits == 1) {
        pack_plane<1, 0>(tiles, num_tiles, packed);
    } else {
        packed = pack_plane<2, 0>(tiles, num_tiles, packed);
        if (bits == 3) pack_plane<1, 2>(tiles, num_tiles, packed);
    }
}

// Unpacks the key tiles of a low record: 8 tiles for each band, with the bits of the band.
inline void unpack_keys(const uint8_t* packed, const LowLayout& layout, uint8_t* tiles) {
    for (int band = 0; band < layout.bands(); ++band, tiles += 8 * kLine) {
        const int bits = layout.band_bits(band);
        unpack(packed, bits, 8, tiles);
        packed += bits * kLine;
    }
}

inline void pack_keys(const uint8_t* tiles, const LowLayout& layout, uint8_t* packed) {
    for (int band = 0; band < layout.bands(); ++band, tiles += 8 * kLine) {
        const int bits = layout.band_bits(band);
        pack(tiles, bits, 8, packed);
        packed += bits * kLine;
    }
}

inline void copy4(uint8_t* to, const uint8_t* from) { __builtin_memcpy(to, from, 4); }

// Byte offset of one number in the key tiles or value tiles of a 16-token record.
inline int key_place(int token, int channel) {
    return channel / 4 * kLine + token * 4 + channel % 4;
}
inline int value_place(int token, int channel, int head_dim) {
    return (token / 4 * (head_dim / 16) + channel / 16) * kLine + channel % 16 * 4 + token % 4;
}

}  // namespace mikv::MIKV_ISA
