// Changes of a stream: low records move, high tokens are demoted, new tokens are appended.
#pragma once

#include "arena.hpp"
#include "high_tier.hpp"
#include "select.hpp"
#include "stream.hpp"

namespace mikv::MIKV_ISA {

// Sizes of the tiers of one block.
struct Sizes {
    int high_tokens, low_records, low_end_line;

    int num_tokens() const { return high_tokens + kLowRecordTokens * low_records; }

    // First line of a low record; record 0 has the lowest one.
    int low_record_line(const LowLayout& low, int record) const {
        return low_end_line - (low_records - record) * low.num_lines;
    }
};

// Scratch for the changes of one stream with at most `max_high` high tokens.
struct ChangeScratch {
    LowRecordScratch low;      // the tokens that become a low record
    uint8_t *source, *target;  // one record each, of either tier
    float* scores;             // this and the following: one per high token
    uint64_t* keys;
    uint8_t* chosen;

    static size_t bytes(int max_high) {
        const size_t per_token = sizeof(float) + sizeof(uint64_t) + sizeof(uint8_t);
        return sizeof(LowRecordScratch) + 2 * kRecord + (max_high + 64) * per_token + 512;
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
    // Bytes of the largest record: a high record of 16-bit numbers, with its scores.
    static constexpr int kRecord = 2 * kHighRecordTokens * kMaxHeadDim * 2 + 256;
};

// Removes the tokens with s.chosen[i] == 1 from the high tier; the others keep their order. Calls
// leave(record, slot) for each removed token, before its bytes are overwritten.
template <class Leave>
void compact(const Stream& stream, const HighLayout& high, Sizes& sizes, ChangeScratch& s,
             const Leave& leave) {
    const HighSlot slots{high};
    const int n = sizes.high_tokens;
    int kept = 0;
    bool leaving = false;
    for (int record = 0; record < high_records(n); ++record) {
        const int first = record * kHighRecordTokens, end = first + kHighRecordTokens;
        const int last = end < n ? end : n;
        const bool before = leaving;
        for (int t = first; t < last; ++t) leaving |= s.chosen[t];
        if (!leaving) {
            kept = last;
            continue;
        }
        // The record is copied before its bytes are overwritten.
        stream.read(high.record_line(record), high.num_lines, s.source);
        if (!before) {
            __builtin_memcpy(s.target, s.source, static_cast<size_t>(high.num_lines) * kLine);
        }
        for (int t = first; t < last; ++t) {
            const int slot = t - first;
            if (s.chosen[t]) {
                leave(s.source, slot);
                continue;
            }
            slots.copy(s.source, slot, s.target, kept % kHighRecordTokens);
            if (++kept % kHighRecordTokens == 0) {
                stream.write(high.record_line(kept / kHighRecordTokens - 1), high.num_lines,
                             s.target);
            }
        }
    }
    if (leaving && kept % kHighRecordTokens) {
        stream.write(high.record_line(kept / kHighRecordTokens), high.num_lines, s.target);
    }
    sizes.high_tokens = kept;
}

// Reads the scores of `count` high tokens. `scores` has room for whole records.
inline void read_scores(const Stream& stream, const HighLayout& high, int count, float* scores) {
    for (int record = 0; record < high_records(count); ++record) {
        stream.read(high.score_line(record), 1,
                    reinterpret_cast<uint8_t*>(scores + record * kHighRecordTokens));
    }
}

// Quantizes the tokens in s.low into a new low record, below the lowest one.
inline void add_low_record(const Stream& stream, const LowLayout& low, const KeyFrame& frame,
                           Sizes& sizes, ChangeScratch& s) {
    __builtin_memset(s.source, 0, static_cast<size_t>(low.num_lines) * kLine);
    quantize_low_record(s.low, low, frame, s.source);
    ++sizes.low_records;
    stream.write(sizes.low_record_line(low, 0), low.num_lines, s.source);
}

// Demotes the 32 high tokens with the lowest scores into one low record. The newest `recent` tokens
// are not candidates.
inline void demote(const Layer& layer, const Stream& stream, const HighLayout& high,
                   const LowLayout& low, Sizes& sizes, ChangeScratch& s) {
    const int d = layer.head_dim, candidates = sizes.high_tokens - layer.recent;
    read_scores(stream, high, sizes.high_tokens, s.scores);
    select_least(s.scores, candidates, kLowRecordTokens, s.keys, s.chosen);
    __builtin_memset(s.chosen + candidates, 0, static_cast<size_t>(layer.recent));
    alignas(64) uint8_t header[kMaxHeader];
    stream.read(0, header_lines(d), header);
    int victim = 0;
    compact(stream, high, sizes, s, [&](const uint8_t* record, int slot) {
        HighSlot{high}.read(record, slot, s.low.keys + victim * d, s.low.values + victim,
                            kLowRecordTokens, layer.dtype);
        ++victim;
    });
    add_low_record(stream, low, KeyFrame(header, d), sizes, s);
}

// Appends a token to the high tier. `buffer` has room for one record.
inline void append(const Layer& layer, const Stream& stream, const HighLayout& high, Sizes& sizes,
                   const uint16_t* key, const uint16_t* value, float score, uint8_t* buffer) {
    const int record = sizes.high_tokens / kHighRecordTokens;
    const int slot = sizes.high_tokens % kHighRecordTokens;
    const Editor editor(stream, high.record_line(record), high.num_lines, buffer);
    HighSlot{high}.write(editor.data, slot, key, value, score, layer.dtype);
    ++sizes.high_tokens;
}

}  // namespace mikv::MIKV_ISA
