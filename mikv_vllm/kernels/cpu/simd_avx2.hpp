// Vector primitives with AVX2, FMA and F16C: every vector is a pair of registers. See simd.hpp for
// the meaning of each one.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mikv::MIKV_ISA {

struct F {
    __m256 a, b;
};
struct I {
    __m256i a, b;
};
using B = I;

constexpr int kScoreRows = 3;
constexpr int kScoreVectors = 2;
constexpr int kAccumulators = 6;

inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline F splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline F vmin(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F vmax(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F vabs(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F first_lanes(F x, int n, F other) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i a = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes);
    const __m256i b = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lanes);
    return {_mm256_blendv_ps(other.a, x.a, _mm256_castsi256_ps(a)),
            _mm256_blendv_ps(other.b, x.b, _mm256_castsi256_ps(b))};
}
inline F zero_below(F x, float limit, F result) {
    const __m256 l = _mm256_set1_ps(limit);
    return {_mm256_and_ps(_mm256_cmp_ps(x.a, l, _CMP_GE_OQ), result.a),
            _mm256_and_ps(_mm256_cmp_ps(x.b, l, _CMP_GE_OQ), result.b)};
}
inline float sum(F x) {
    const __m256 y = _mm256_add_ps(x.a, x.b);
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
inline float largest(F x) {
    const __m256 y = _mm256_max_ps(x.a, x.b);
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}

inline __m256i load_half(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline void store_half(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline I load_i(const int32_t* p) { return {load_half(p), load_half(p + 8)}; }
inline void store_i(int32_t* p, I x) {
    store_half(p, x.a);
    store_half(p + 8, x.b);
}
inline I splat_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I add_i(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I sub_i(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I min_i(I x, I y) { return {_mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b)}; }
inline I max_i(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
template <int N> inline I shl_i(I x) {
    return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
}
template <int N> inline I sar_i(I x) {
    return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)};
}
inline int32_t sum_i(I x) {
    alignas(64) int32_t v[16];
    store_i(v, x);
    int32_t total = 0;
    for (int32_t lane : v) total += lane;
    return total;
}
inline I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I bits_of(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline F float_of(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline F round_even(F x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

inline F vceil(F x) { return {_mm256_ceil_ps(x.a), _mm256_ceil_ps(x.b)}; }

inline __m128i load_quarter(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
inline I load_u8(const uint8_t* p) {
    const __m128i x = load_quarter(p);
    return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
inline I load_s8(const uint8_t* p) {
    const __m128i x = load_quarter(p);
    return {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))};
}
inline void store_u8(uint8_t* p, I x) {
    alignas(32) int32_t v[16];
    store_i(v, x);
    for (int i = 0; i < 16; ++i) p[i] = static_cast<uint8_t>(v[i]);
}
inline F load_bf16(const uint16_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_quarter(p)), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_quarter(p + 8)), 16))};
}
inline F load_fp16(const uint16_t* p) {
    return {_mm256_cvtph_ps(load_quarter(p)), _mm256_cvtph_ps(load_quarter(p + 8))};
}
inline void store_u16(uint16_t* p, I x) {
    // The pack instruction works inside 128-bit lanes; the permutation restores the order.
    store_half(p, _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8));
}
inline void store_fp16(uint16_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, 0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, 0));
}
inline __m256i gather_half(const uint16_t* base, const int32_t* index) {
    // Reads whole aligned pairs, so that no byte after the last number is read.
    const __m256i i = load_half(index);
    const int* pairs = reinterpret_cast<const int*>(base);
    const __m256i pair = _mm256_i32gather_epi32(pairs, _mm256_srli_epi32(i, 1), 4);
    const __m256i shift = _mm256_slli_epi32(_mm256_and_si256(i, _mm256_set1_epi32(1)), 4);
    return _mm256_and_si256(_mm256_srlv_epi32(pair, shift), _mm256_set1_epi32(0xffff));
}
inline I gather_u16(const uint16_t* base, const int32_t* index) {
    return {gather_half(base, index), gather_half(base, index + 8)};
}

inline B load_b(const void* p) {
    return {load_half(p), load_half(static_cast<const uint8_t*>(p) + 32)};
}
inline void store_b(void* p, B x) {
    store_half(p, x.a);
    store_half(static_cast<uint8_t*>(p) + 32, x.b);
}
inline B splat_b(uint8_t x) {
    const __m256i y = _mm256_set1_epi8(static_cast<char>(x));
    return {y, y};
}
inline B and_b(B x, B y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline B or_b(B x, B y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline B xor_b(B x, B y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
template <int N> inline B shr_b(B x) {
    return {_mm256_srli_epi16(x.a, N), _mm256_srli_epi16(x.b, N)};
}
template <int N> inline B shl_b(B x) {
    return {_mm256_slli_epi16(x.a, N), _mm256_slli_epi16(x.b, N)};
}

// One half of a byte dot product. `Small`: sums of two products fit into 16 bits. Otherwise maddubs
// could saturate, so even and odd bytes are multiplied separately, as 16-bit numbers.
template <bool Small> inline __m256i dot_half(__m256i acc, __m256i u, __m256i s) {
    if constexpr (Small) {
        const __m256i pairs = _mm256_maddubs_epi16(u, s);
        return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    const __m256i mask = _mm256_set1_epi16(255);
    const __m256i even =
        _mm256_madd_epi16(_mm256_and_si256(u, mask), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
template <bool Small> inline I dot_keys(I acc, B keys, const uint8_t* query) {
    int32_t four;
    __builtin_memcpy(&four, query, 4);
    const __m256i q = _mm256_set1_epi32(four);
    return {dot_half<Small>(acc.a, keys.a, q), dot_half<Small>(acc.b, keys.b, q)};
}
template <bool Small> inline I dot_values(I acc, B values, const uint8_t* weights) {
    int32_t four;
    __builtin_memcpy(&four, weights, 4);
    const __m256i w = _mm256_set1_epi32(four);
    return {dot_half<Small>(acc.a, w, values.a), dot_half<Small>(acc.b, w, values.b)};
}

inline void split_signed(const I x[4], uint8_t* high, uint8_t* low) {
    const __m256i mask = _mm256_set1_epi16(127);
    const auto half = [&](__m256i x0, __m256i x1, __m256i x2, __m256i x3, int at) {
        const __m256i a = _mm256_packs_epi32(x0, x1), b = _mm256_packs_epi32(x2, x3);
        store_half(high + at, _mm256_packs_epi16(_mm256_srai_epi16(a, 7), _mm256_srai_epi16(b, 7)));
        store_half(low + at,
                   _mm256_packus_epi16(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)));
    };
    half(x[0].a, x[1].a, x[2].a, x[3].a, 0);
    half(x[0].b, x[1].b, x[2].b, x[3].b, 32);
}
inline void split_unsigned(const I x[4], uint8_t* high, uint8_t* low) {
    const __m256i mask = _mm256_set1_epi16(255);
    const auto half = [&](__m256i x0, __m256i x1, __m256i x2, __m256i x3, int at) {
        const __m256i a = _mm256_packus_epi32(x0, x1), b = _mm256_packus_epi32(x2, x3);
        store_half(high + at,
                   _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8)));
        store_half(low + at,
                   _mm256_packus_epi16(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)));
    };
    half(x[0].a, x[1].a, x[2].a, x[3].a, 0);
    half(x[0].b, x[1].b, x[2].b, x[3].b, 32);
}

}  // namespace mikv::MIKV_ISA
