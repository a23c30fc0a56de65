// Vector primitives with AVX-512 (F, BW, DQ, VL, VNNI). See simd.hpp for the meaning of each one.
// The kernels for AMX use them too; their tile products are in dots_amx.hpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mikv::MIKV_ISA {

using F = __m512;   // 16 floats
using I = __m512i;  // 16 int32
using B = __m512i;  // 64 bytes

// Register blocking of the products in score.cpp: query rows x vectors of tokens.
constexpr int kScoreRows = 6;
constexpr int kScoreVectors = 4;
// Accumulators that fit into the registers of a dot product.
constexpr int kAccumulators = 24;

inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F splat(float x) { return _mm512_set1_ps(x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F vmin(F a, F b) { return _mm512_min_ps(a, b); }
inline F vmax(F a, F b) { return _mm512_max_ps(a, b); }
inline F vabs(F a) { return _mm512_abs_ps(a); }
inline F first_lanes(F x, int n, F other) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>((1u << n) - 1), other, x);
}
inline F zero_below(F x, float limit, F result) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, splat(limit), _CMP_GE_OQ), result);
}
inline float sum(F x) { return _mm512_reduce_add_ps(x); }
inline float largest(F x) { return _mm512_reduce_max_ps(x); }

inline I load_i(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store_i(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
inline I splat_i(int32_t x) { return _mm512_set1_epi32(x); }
inline I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
inline I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I min_i(I a, I b) { return _mm512_min_epi32(a, b); }
inline I max_i(I a, I b) { return _mm512_max_epi32(a, b); }
template <int N> inline I shl_i(I a) { return _mm512_slli_epi32(a, N); }
template <int N> inline I sar_i(I a) { return _mm512_srai_epi32(a, N); }
inline int32_t sum_i(I x) { return _mm512_reduce_add_epi32(x); }
inline I to_int(F x) { return _mm512_cvtps_epi32(x); }
inline F to_float(I x) { return _mm512_cvtepi32_ps(x); }
inline I bits_of(F x) { return _mm512_castps_si512(x); }
inline F float_of(I x) { return _mm512_castsi512_ps(x); }
inline F round_even(F x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline F vceil(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC); }

inline I load_u8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline I load_s8(const uint8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_u8(uint8_t* p, I x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
inline F load_bf16(const uint16_t* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return float_of(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline F load_fp16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_u16(uint16_t* p, I x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}
inline void store_fp16(uint16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, 0));
}
inline I gather_u16(const uint16_t* base, const int32_t* index) {
    // Reads whole aligned pairs, so that no byte after the last number is read.
    const I i = load_i(index);
    const I pair = _mm512_i32gather_epi32(_mm512_srli_epi32(i, 1), base, 4);
    const I shift = _mm512_slli_epi32(_mm512_and_si512(i, splat_i(1)), 4);
    return _mm512_and_si512(_mm512_srlv_epi32(pair, shift), splat_i(0xffff));
}

inline B load_b(const void* p) { return _mm512_loadu_si512(p); }
inline void store_b(void* p, B x) { _mm512_storeu_si512(p, x); }
inline B splat_b(uint8_t x) { return _mm512_set1_epi8(static_cast<char>(x)); }
inline B and_b(B a, B b) { return _mm512_and_si512(a, b); }
inline B or_b(B a, B b) { return _mm512_or_si512(a, b); }
inline B xor_b(B a, B b) { return _mm512_xor_si512(a, b); }
template <int N> inline B shr_b(B a) { return N ? _mm512_srli_epi16(a, N) : a; }
template <int N> inline B shl_b(B a) { return N ? _mm512_slli_epi16(a, N) : a; }

template <bool Small> inline I dot_keys(I acc, B keys, const uint8_t* query) {
    int32_t four;
    __builtin_memcpy(&four, query, 4);
    return _mm512_dpbusd_epi32(acc, keys, _mm512_set1_epi32(four));
}
template <bool Small> inline I dot_values(I acc, B values, const uint8_t* weights) {
    int32_t four;
    __builtin_memcpy(&four, weights, 4);
    return _mm512_dpbusd_epi32(acc, _mm512_set1_epi32(four), values);
}

// Relative error 1e-7.
inline F exp2(F x) {
    const F r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
    F p = splat(1.87757667e-3f);
    p = fma(p, r, splat(8.98934009e-3f));
    p = fma(p, r, splat(5.58263181e-2f));
    p = fma(p, r, splat(2.40153617e-1f));
    p = fma(p, r, splat(6.93153073e-1f));
    p = fma(p, r, splat(9.99999925e-1f));
    return _mm512_scalef_ps(p, x);
}

// The pack instructions work inside 128-bit lanes. AMX tile products need the original order.
inline void store_packed(uint8_t* to, B x) {
#if defined(MIKV_USE_AMX)
    const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    x = _mm512_permutexvar_epi32(order, x);
#endif
    store_b(to, x);
}
inline void split_signed(const I x[4], uint8_t* high, uint8_t* low) {
    const I a = _mm512_packs_epi32(x[0], x[1]), b = _mm512_packs_epi32(x[2], x[3]);
    const I mask = _mm512_set1_epi16(127);
    store_packed(high, _mm512_packs_epi16(_mm512_srai_epi16(a, 7), _mm512_srai_epi16(b, 7)));
    store_packed(low, _mm512_packus_epi16(and_b(a, mask), and_b(b, mask)));
}
inline void split_unsigned(const I x[4], uint8_t* high, uint8_t* low) {
    const I a = _mm512_packus_epi32(x[0], x[1]), b = _mm512_packus_epi32(x[2], x[3]);
    const I mask = _mm512_set1_epi16(255);
    store_packed(high, _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)));
    store_packed(low, _mm512_packus_epi16(and_b(a, mask), and_b(b, mask)));
}

}  // namespace mikv::MIKV_ISA
