// Reading native pages, in any order of elements that an index describes.
#pragma once

#include "api.hpp"
#include "simd.hpp"

namespace mikv::MIKV_ISA {

// 16 numbers as floats. `runs`: index[0..15] are consecutive.
inline F load_indexed(const uint16_t* region, const int32_t* index, bool runs, int dtype) {
    if (runs) return load_half(region + index[0], dtype);
    const I x = gather_u16(region, index);
    if (dtype == kBf16) return float_of(shl_i<16>(x));
    alignas(64) uint16_t half[16];
    store_u16(half, x);
    return load_fp16(half);
}

struct NativePages {
    const Layer& layer;
    const Cache& cache;
    const int32_t* table;

    const uint16_t* region(int page, int head) const {
        return reinterpret_cast<const uint16_t*>(cache.base + table[page] * cache.page_stride +
                                                 head * cache.head_stride);
    }

    // Copies tokens of a page to `out` [tokens, head_dim], 2-byte numbers.
    void rows(int page, int head, int tokens, const int32_t* index, bool runs,
              uint16_t* out) const {
        const uint16_t* from = region(page, head);
        for (int i = 0; i < tokens * layer.head_dim; i += 16) {
            if (runs) {
                __builtin_memcpy(out + i, from + index[i], 32);
            } else {
                store_u16(out + i, gather_u16(from, index + i));
            }
        }
    }
};

}  // namespace mikv::MIKV_ISA
