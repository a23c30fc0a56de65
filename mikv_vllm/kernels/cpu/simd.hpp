// Vector types and primitives of the instruction set (ISA) that this translation unit is compiled
// for.
//
//   F  16 floats      I  16 int32      B  64 bytes
//
// Every primitive has the same meaning on every ISA. Those whose name does not say it:
//   first_lanes(x, n, other)        lanes below n from x, the other lanes from other
//   zero_below(x, limit, result)    result where x >= limit, else 0
//   to_int, round_even              nearest, ties to even, as torch.round
//   gather_u16(base, index)         base[index[0..15]], zero-extended
//   shr_b, shl_b                    shifts of bytes; bits of the neighbouring byte may be shifted
//   in,
//                                   so the result has to be masked
//   dot_keys<Small>(acc, k, q)      acc[i] += sum_j k[4i+j] * q[j], k unsigned, q 4 signed bytes
//   dot_values<Small>(acc, v, w)    acc[i] += sum_j v[4i+j] * w[j], v signed, w 4 unsigned bytes
//                                   Small: keys or values have at most 6 bits
//   split_signed(x, high, low)      64 integers below 2**14 as bytes: x = high * 128 + low
//   split_unsigned(x, high, low)    64 integers below 2**16 as bytes: x = high * 256 + low
//                                   integers 4i .. 4i+3 are written at split_place(i) in both
//   exp2(x)                         2**x for x < 127; 0 for x below about -126
#pragma once

#if defined(MIKV_USE_AVX512)
#include "simd_avx512.hpp"
#elif defined(MIKV_USE_AVX2)
#include "simd_avx2.hpp"
#else
#include "simd_scalar.hpp"
#endif

namespace mikv::MIKV_ISA {

enum Dtype { kBf16 = 0, kFp16 = 1 };

constexpr float kLog2E = 1.44269504f;

#if defined(MIKV_USE_AMX)
constexpr bool kAmx = true;
#else
constexpr bool kAmx = false;
#endif

// Byte offset of integers 4*quad .. 4*quad+3 in the output of split_signed and split_unsigned.
// Without AMX the integers are not in order, because the pack instructions work inside 128-bit
// lanes, and reordering their output would cost time in every call.
// split_place(a + b) = split_place(a) + split_place(b) if a is a multiple of 4 and b < 4, or
// a is a multiple of 8 and b < 8, or a is a multiple of 16.
constexpr int split_place(int quad) {
#if defined(MIKV_USE_AMX)
    return 4 * quad;
#else
    const int vector = quad % 16 / 4, lane = quad % 4;
    return quad / 16 * 64 + (lane * 4 + vector) * 4;
#endif
}

inline F load_half(const uint16_t* p, int dtype) {
    return dtype == kBf16 ? load_bf16(p) : load_fp16(p);
}

inline void store_bf16(uint16_t* p, F x) {
    // Rounds to nearest, ties to even. A NaN keeps its upper bits.
    alignas(64) uint32_t bits[16];
    store(reinterpret_cast<float*>(bits), x);
    for (int i = 0; i < 16; ++i) {
        const bool nan = (bits[i] & 0x7fffffff) > 0x7f800000;
        p[i] = static_cast<uint16_t>(nan ? (bits[i] >> 16 | 64)
                                         : (bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16);
    }
}

inline void store_half(uint16_t* p, F x, int dtype) {
    dtype == kBf16 ? store_bf16(p, x) : store_fp16(p, x);
}

#if !defined(MIKV_USE_AVX512)
inline F exp2(F x) {
    const F clamped = vmax(x, splat(-126.0f));
    const F n = round_even(clamped), r = sub(clamped, n);
    F p = splat(1.3276472e-3f);
    p = fma(p, r, splat(9.67554133e-3f));
    p = fma(p, r, splat(5.55071327e-2f));
    p = fma(p, r, splat(2.40221197e-1f));
    p = fma(p, r, splat(6.93146967e-1f));
    p = fma(p, r, splat(1.00000007f));
    return zero_below(x, -126.0f, float_of(add_i(bits_of(p), shl_i<23>(to_int(n)))));
}
#endif

inline F tanh(F x) {
    const F bounded = vmax(vmin(x, splat(20.0f)), splat(-20.0f));
    const F e = exp2(mul(bounded, splat(2.0f * kLog2E)));
    return sub(splat(1.0f), div(splat(2.0f), add(e, splat(1.0f))));
}

}  // namespace mikv::MIKV_ISA
