// Tokens of the high tier.
#pragma once

#include <initializer_list>

#include "codec.hpp"

namespace mikv::MIKV_ISA {

// Reads and writes one token of a high record.
struct HighSlot {
    const HighLayout& layout;

    void write(uint8_t* record, int slot, const uint16_t* key, const uint16_t* value, float score,
               int dtype) const {
        __builtin_memcpy(record + layout.scores + 4 * slot, &score, 4);
        const int d = layout.head_dim;
        if (layout.bits == 16) {
            const size_t row = static_cast<size_t>(2 * d);
            __builtin_memcpy(record + slot * row, key, row);
            __builtin_memcpy(record + layout.values + slot * row, value, row);
            return;
        }
        alignas(64) float x[kMaxHeadDim];
        alignas(64) uint8_t integers[kMaxHeadDim];
        for (int c = 0; c < d; c += 16) store(x + c, load_half(key + c, dtype));
        uint16_t scale = quantize_high(x, d, integers);
        __builtin_memcpy(record + layout.key_scales + 2 * slot, &scale, 2);
        for (int c = 0; c < d; c += 4) copy4(record + key_place(slot, c), integers + c);
        for (int c = 0; c < d; c += 16) store(x + c, load_half(value + c, dtype));
        scale = quantize_high(x, d, integers);
        __builtin_memcpy(record + layout.value_scales + 2 * slot, &scale, 2);
        uint8_t* values = record + layout.values;
        for (int c = 0; c < d; ++c) values[value_place(slot, c, d)] = integers[c];
    }

    // Dequantizes to key[c] and value[c * value_stride].
    void read(const uint8_t* record, int slot, float* key, float* value, int value_stride,
              int dtype) const {
        const int d = layout.head_dim;
        alignas(64) float x[kMaxHeadDim];
        if (layout.bits == 16) {
            const uint16_t* k = reinterpret_cast<const uint16_t*>(record) + slot * d;
            const uint16_t* v =
                reinterpret_cast<const uint16_t*>(record + layout.values) + slot * d;
            for (int c = 0; c < d; c += 16) store(key + c, load_half(k + c, dtype));
            for (int c = 0; c < d; c += 16) store(x + c, load_half(v + c, dtype));
        } else {
            alignas(64) float scale[16];
            const auto scale_of = [&](int at) {
                store(scale, load_fp16(reinterpret_cast<const uint16_t*>(record + at)));
                return scale[slot];
            };
            const float key_scale = scale_of(layout.key_scales);
            const float value_scale = scale_of(layout.value_scales);
            const uint8_t* values = record + layout.values;
            for (int c = 0; c < d; ++c) {
                key[c] = static_cast<float>(record[key_place(slot, c)] - kHighOffset) * key_scale;
                x[c] =
                    static_cast<float>(values[value_place(slot, c, d)] - kHighOffset) * value_scale;
            }
        }
        for (int c = 0; c < d; ++c) value[c * value_stride] = x[c];
    }

    // Copies a token, with its score, without quantizing it again.
    void copy(const uint8_t* from, int from_slot, uint8_t* to, int to_slot) const {
        const int d = layout.head_dim;
        copy4(to + layout.scores + 4 * to_slot, from + layout.scores + 4 * from_slot);
        if (layout.bits == 16) {
            const size_t row = static_cast<size_t>(2 * d);
            __builtin_memcpy(to + to_slot * row, from + from_slot * row, row);
            __builtin_memcpy(to + layout.values + to_slot * row,
                             from + layout.values + from_slot * row, row);
            return;
        }
        for (const int scales : {layout.key_scales, layout.value_scales}) {
            __builtin_memcpy(to + scales + 2 * to_slot, from + scales + 2 * from_slot, 2);
        }
        for (int c = 0; c < d; c += 4) {
            copy4(to + key_place(to_slot, c), from + key_place(from_slot, c));
        }
        const uint8_t* source = from + layout.values + value_place(from_slot, 0, d);
        uint8_t* target = to + layout.values + value_place(to_slot, 0, d);
        for (int c = 0; c < d; ++c) target[4 * c] = source[4 * c];
    }
};

}  // namespace mikv::MIKV_ISA
