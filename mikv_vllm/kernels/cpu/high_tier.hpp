// What a decode step changes in a stream before it attends: chunks move, high tokens become a low
// chunk, the new token arrives.
#pragma once

#include <initializer_list>

#include "codec.hpp"

namespace mikv::MIKV_ISA {

// Sizes of one request's tiers; `low_end_line` in lines.
struct Sizes {
    int high_tokens, low_records, low_end_line;
};

// Room for one item's changes. `max_high`: high tokens that it may meet.
struct ChangeScratch {
    LowRecordScratch chunk;
    uint8_t *source, *target;  // a record each, of either tier
    float* scores;
    uint64_t* keys;
    uint8_t* chosen;

    static size_t bytes(int max_high) {
        return sizeof(LowRecordScratch) + 2 * kRecord + static_cast<size_t>(max_high + 64) * 13 + 512;
    }
    static ChangeScratch* make(Arena& arena, int max_high) {
        ChangeScratch* s = arena.take<ChangeScratch>(1);
        s->source = arena.take<uint8_t>(kRecord);
        s->target = arena.take<uint8_t>(kRecord);
        s->scores = arena.take<float>(max_high + 16);
        s->keys = arena.take<uint64_t>(max_high + 16);
        s->chosen = arena.take<uint8_t>(max_high + 16);
        return s;
    }
    static constexpr int kRecord = 2 * kHighRecordTokens * 256 * 2 + 256;
};

// One token of a high record. `keys` and `values` point at the record's parts.
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
        alignas(64) float x[256];
        alignas(64) uint8_t integers[256];
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
        alignas(64) float x[256];
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
                key[c] = static_cast<float>(record[key_place(slot, c)] - 128) * key_scale;
                x[c] = static_cast<float>(values[value_place(slot, c, d)] - 128) * value_scale;
            }
        }
        for (int c = 0; c < d; ++c) value[c * value_stride] = x[c];
    }

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
        for (int c = 0; c < d; c += 4) copy4(to + key_place(to_slot, c), from + key_place(from_slot, c));
        const uint8_t* source = from + layout.values + value_place(from_slot, 0, d);
        uint8_t* target = to + layout.values + value_place(to_slot, 0, d);
        for (int c = 0; c < d; ++c) target[4 * c] = source[4 * c];
    }
};

// Moves the lowest-lying chunks behind the last one, into the pages that end at `low_end_line_after`.
inline void move_low_records(const Stream& stream, const LowLayout& low, Sizes& sizes, int count,
                        int low_end_line_after, uint8_t* buffer) {
    if (count > sizes.low_records) count = sizes.low_records;
    const int first = sizes.low_end_line - sizes.low_records * low.num_lines;
    for (int i = 0; i < count; ++i) {
        stream.read(first + i * low.num_lines, low.num_lines, buffer);
        stream.write(low_end_line_after - (count - i) * low.num_lines, low.num_lines, buffer);
    }
    sizes.low_end_line = low_end_line_after;
}

// Removes the tokens that `s.chosen` marks from the high tier: later ones close the holes.
// `leave(record, slot)` sees each of them before anything is written over it.
template <class Leave>
void compact(const Stream& stream, const HighLayout& high, Sizes& sizes, ChangeScratch& s,
             const Leave& leave) {
    const HighSlot slots{high};
    const int n = sizes.high_tokens, groups = (n + kHighRecordTokens - 1) / kHighRecordTokens;
    int kept = 0;
    bool leaving = false;
    for (int g = 0; g < groups; ++g) {
        const int first = g * kHighRecordTokens, last = first + kHighRecordTokens < n ? first + kHighRecordTokens : n;
        const bool before = leaving;
        for (int t = first; t < last; ++t) leaving |= s.chosen[t];
        if (!leaving) {
            kept = last;
            continue;
        }
        // A group is copied before anything is written over it.
        stream.read(high.high_record_line(g), high.num_lines, s.source);
        if (!before) __builtin_memcpy(s.target, s.source, static_cast<size_t>(high.num_lines) * kLine);
        for (int t = first; t < last; ++t) {
            const int slot = t - first;
            if (s.chosen[t]) {
                leave(s.source, slot);
                continue;
            }
            slots.copy(s.source, slot, s.target, kept % kHighRecordTokens);
            if (++kept % kHighRecordTokens == 0) {
                stream.write(high.high_record_line(kept / kHighRecordTokens - 1), high.num_lines, s.target);
            }
        }
    }
    if (leaving && kept % kHighRecordTokens) {
        stream.write(high.high_record_line(kept / kHighRecordTokens), high.num_lines, s.target);
    }
    sizes.high_tokens = kept;
}

// Scores of the high tier, with room for those of its last group that is not full.
inline void read_scores(const Stream& stream, const HighLayout& high, int count, float* scores) {
    for (int g = 0; g < (count + kHighRecordTokens - 1) / kHighRecordTokens; ++g) {
        stream.read(high.high_record_line(g) + high.num_lines - 1, 1,
                    reinterpret_cast<uint8_t*>(scores + g * kHighRecordTokens));
    }
}

// Writes the chunk in `s` as the new lowest one.
inline void add_low_record(const Stream& stream, const LowLayout& low, const KeyFrame& frame,
                      Sizes& sizes, ChangeScratch& s) {
    __builtin_memset(s.source, 0, static_cast<size_t>(low.num_lines) * kLine);
    quantize_low_record(s.chunk, low, frame, s.source);
    ++sizes.low_records;
    stream.write(sizes.low_end_line - sizes.low_records * low.num_lines, low.num_lines, s.source);
}

// Turns the 32 least important high tokens, the recent ones aside, into a new lowest chunk.
inline void demote(const Layer& layer, const Stream& stream, const HighLayout& high,
                   const LowLayout& low, Sizes& sizes, ChangeScratch& s) {
    const int d = layer.head_dim, candidates = sizes.high_tokens - layer.recent;
    read_scores(stream, high, sizes.high_tokens, s.scores);
    select_least(s.scores, candidates, kLowRecordTokens, s.keys, s.chosen);
    __builtin_memset(s.chosen + candidates, 0, static_cast<size_t>(layer.recent));
    alignas(64) uint8_t header[kHeader];
    stream.read(0, header_lines(d), header);
    int victim = 0;
    compact(stream, high, sizes, s, [&](const uint8_t* record, int slot) {
        HighSlot{high}.read(record, slot, s.chunk.keys + victim * d, s.chunk.values + victim,
                            kLowRecordTokens, layer.dtype);
        ++victim;
    });
    add_low_record(stream, low, KeyFrame(header, d), sizes, s);
}

// Appends a token to the high tier.
inline void append(const Layer& layer, const Stream& stream, const HighLayout& high, Sizes& sizes,
                   const uint16_t* key, const uint16_t* value, float score, uint8_t* buffer) {
    const int group = sizes.high_tokens / kHighRecordTokens, slot = sizes.high_tokens % kHighRecordTokens;
    const Editor record(stream, high.high_record_line(group), high.num_lines, buffer);
    HighSlot{high}.write(record.data, slot, key, value, score, layer.dtype);
    ++sizes.high_tokens;
}

}  // namespace mikv::MIKV_ISA
