// Vector primitives as plain loops, for processors without an implementation of their own. See
// simd.hpp for the meaning of each one.
#pragma once

#include <cmath>
#include <cstdint>

namespace mikv::MIKV_ISA {

struct F {
    float v[16];
};
struct I {
    int32_t v[16];
};
struct B {
    uint8_t v[64];
};

constexpr int kScoreRows = 1;
constexpr int kScoreVectors = 1;
constexpr int kAccumulators = 2;

#define MIKV_LANES(type, count, expression)              \
    type r;                                              \
    for (int i = 0; i < count; ++i) r.v[i] = expression; \
    return r

template <class T, class P> inline T copy_from(const P* p) {
    T r;
    __builtin_memcpy(&r, p, sizeof(T));
    return r;
}
inline F load(const float* p) { return copy_from<F>(p); }
inline void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
inline F splat(float x) { MIKV_LANES(F, 16, x); }
inline F add(F a, F b) { MIKV_LANES(F, 16, a.v[i] + b.v[i]); }
inline F sub(F a, F b) { MIKV_LANES(F, 16, a.v[i] - b.v[i]); }
inline F mul(F a, F b) { MIKV_LANES(F, 16, a.v[i] * b.v[i]); }
inline F div(F a, F b) { MIKV_LANES(F, 16, a.v[i] / b.v[i]); }
inline F fma(F a, F b, F c) { MIKV_LANES(F, 16, a.v[i] * b.v[i] + c.v[i]); }
inline F vmin(F a, F b) { MIKV_LANES(F, 16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F vmax(F a, F b) { MIKV_LANES(F, 16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F vabs(F a) { MIKV_LANES(F, 16, __builtin_fabsf(a.v[i])); }
inline F first_lanes(F x, int n, F other) { MIKV_LANES(F, 16, i < n ? x.v[i] : other.v[i]); }
inline F zero_below(F x, float limit, F result) {
    MIKV_LANES(F, 16, x.v[i] >= limit ? result.v[i] : 0.0f);
}
inline float sum(F x) {
    float total = 0;
    for (float lane : x.v) total += lane;
    return total;
}
inline float largest(F x) {
    float result = x.v[0];
    for (float lane : x.v) result = lane > result ? lane : result;
    return result;
}

inline I load_i(const int32_t* p) { return copy_from<I>(p); }
inline void store_i(int32_t* p, I x) { __builtin_memcpy(p, &x, sizeof x); }
inline I splat_i(int32_t x) { MIKV_LANES(I, 16, x); }
inline I add_i(I a, I b) { MIKV_LANES(I, 16, a.v[i] + b.v[i]); }
inline I sub_i(I a, I b) { MIKV_LANES(I, 16, a.v[i] - b.v[i]); }
inline I min_i(I a, I b) { MIKV_LANES(I, 16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline I max_i(I a, I b) { MIKV_LANES(I, 16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
template <int N> inline I shl_i(I a) {
    MIKV_LANES(I, 16, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << N));
}
template <int N> inline I sar_i(I a) { MIKV_LANES(I, 16, a.v[i] >> N); }
inline int32_t sum_i(I x) {
    int32_t total = 0;
    for (int32_t lane : x.v) total += lane;
    return total;
}
// Adding 1.5 * 2**23 rounds to the nearest even integer in the default rounding mode.
inline F round_even(F x) {
    const auto rounded = [](float lane) {
        return __builtin_fabsf(lane) < 4194304.0f ? (lane + 12582912.0f) - 12582912.0f : lane;
    };
    MIKV_LANES(F, 16, rounded(x.v[i]));
}
inline F vceil(F x) { MIKV_LANES(F, 16, __builtin_ceilf(x.v[i])); }
inline I to_int(F x) {
    const F y = round_even(x);
    MIKV_LANES(I, 16, static_cast<int32_t>(y.v[i]));
}
inline F to_float(I x) { MIKV_LANES(F, 16, static_cast<float>(x.v[i])); }
inline I bits_of(F x) { return copy_from<I>(&x); }
inline F float_of(I x) { return copy_from<F>(&x); }

inline I load_u8(const uint8_t* p) { MIKV_LANES(I, 16, p[i]); }
inline I load_s8(const uint8_t* p) { MIKV_LANES(I, 16, static_cast<int8_t>(p[i])); }
inline void store_u8(uint8_t* p, I x) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<uint8_t>(x.v[i]);
}
inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, body = h & 0x7fff;
    uint32_t bits;
    if (body >= 0x7c00) {
        bits = 0x7f800000 | (body & 0x3ff) << 13;
    } else if (body >= 0x400) {
        bits = (body << 13) + (112u << 23);
    } else {
        const float small = static_cast<float>(body) * 0x1p-24f;
        __builtin_memcpy(&bits, &small, 4);
    }
    bits |= sign;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
inline uint16_t float_to_half(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, body = bits & 0x7fffffff;
    if (body > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (body >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    if (body < 0x38800000) {
        // Adding 0.5 rounds to a multiple of 2**-24, the unit of fp16 subnormals. The lowest
        // mantissa bits of the sum are then the bits of the subnormal.
        float magnitude;
        __builtin_memcpy(&magnitude, &body, 4);
        magnitude += 0.5f;
        uint32_t rounded;
        __builtin_memcpy(&rounded, &magnitude, 4);
        return static_cast<uint16_t>(sign | (rounded - 0x3f000000));
    }
    const uint32_t rounded = body + 0xfff + (body >> 13 & 1) - (112u << 23);
    return static_cast<uint16_t>(sign | rounded >> 13);
}
inline F load_bf16(const uint16_t* p) {
    I bits;
    for (int i = 0; i < 16; ++i) bits.v[i] = static_cast<int32_t>(uint32_t{p[i]} << 16);
    return float_of(bits);
}
inline F load_fp16(const uint16_t* p) { MIKV_LANES(F, 16, half_to_float(p[i])); }
inline void store_u16(uint16_t* p, I x) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<uint16_t>(x.v[i]);
}
inline void store_fp16(uint16_t* p, F x) {
    for (int i = 0; i < 16; ++i) p[i] = float_to_half(x.v[i]);
}
inline I gather_u16(const uint16_t* base, const int32_t* index) {
    MIKV_LANES(I, 16, base[index[i]]);
}

inline B load_b(const void* p) { return copy_from<B>(p); }
inline void store_b(void* p, B x) { __builtin_memcpy(p, &x, sizeof x); }
inline B splat_b(uint8_t x) { MIKV_LANES(B, 64, x); }
inline B and_b(B a, B b) { MIKV_LANES(B, 64, a.v[i] & b.v[i]); }
inline B or_b(B a, B b) { MIKV_LANES(B, 64, a.v[i] | b.v[i]); }
inline B xor_b(B a, B b) { MIKV_LANES(B, 64, a.v[i] ^ b.v[i]); }
template <int N> inline B shr_b(B a) { MIKV_LANES(B, 64, static_cast<uint8_t>(a.v[i] >> N)); }
template <int N> inline B shl_b(B a) { MIKV_LANES(B, 64, static_cast<uint8_t>(a.v[i] << N)); }

template <bool Small> inline I dot_keys(I acc, B keys, const uint8_t* query) {
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 4; ++j) acc.v[i] += keys.v[4 * i + j] * static_cast<int8_t>(query[j]);
    }
    return acc;
}
template <bool Small> inline I dot_values(I acc, B values, const uint8_t* weights) {
    for (int i = 0; i < 16; ++i) {
        const uint8_t* four = values.v + 4 * i;
        for (int j = 0; j < 4; ++j) acc.v[i] += static_cast<int8_t>(four[j]) * weights[j];
    }
    return acc;
}

inline void split_signed(const I x[4], uint8_t* high, uint8_t* low) {
    for (int vector = 0; vector < 4; ++vector) {
        for (int i = 0; i < 16; ++i) {
            const int at = (i / 4 * 4 + vector) * 4 + i % 4;
            high[at] = static_cast<uint8_t>(x[vector].v[i] >> 7);
            low[at] = static_cast<uint8_t>(x[vector].v[i] & 127);
        }
    }
}
inline void split_unsigned(const I x[4], uint8_t* high, uint8_t* low) {
    for (int vector = 0; vector < 4; ++vector) {
        for (int i = 0; i < 16; ++i) {
            const int at = (i / 4 * 4 + vector) * 4 + i % 4;
            high[at] = static_cast<uint8_t>(x[vector].v[i] >> 8);
            low[at] = static_cast<uint8_t>(x[vector].v[i] & 255);
        }
    }
}

#undef MIKV_LANES

}  // namespace mikv::MIKV_ISA
