// Byte layout of tiered pages. It is defined in tiers/formats.py and repeated here for kernels;
// tests/kernels/test_cpu_layout.py compares every number of both.
//
// Like all headers of the kernels, this one has the namespace of an instruction set, although
// nothing in it depends on one. In a common namespace, the linker could merge inline functions that
// were compiled for different instruction sets.
#pragma once

#include <cstdint>

namespace mikv::MIKV_ISA {

constexpr int kLine = 64;              // bytes; the alignment unit of a stream
constexpr int kLowRecordTokens = 32;   // tokens of a low record
constexpr int kHighRecordTokens = 16;  // tokens of a high record
constexpr int kBandChannels = 16;  // key channels of neighbouring rank, stored with the same bits
constexpr int kValueGroup = 64;    // value channels that share one scale per token
constexpr int kKeyZeroSteps = 2;   // the zero point of a key counts in scale / kKeyZeroSteps
// Steps by which the ends of a range may lie outside the grid.
constexpr float kChannelMargin = 0.125f;  // keys of a channel
constexpr float kTokenMargin = 0.25f;     // numbers of a token
constexpr int kNativeBytes = 2;           // bytes of one number in a native page
constexpr int kKeysPerTokenBit = 16;  // bit of a key code: one key scale per token, not per channel
constexpr int kScaleBias = 22;        // exponent bias of an 8-bit scale
constexpr int kHighOffset = 128;      // added to the int8 numbers of the high tier

constexpr int kMaxHeadDim = 256;  // largest head size that the kernels are compiled for

constexpr int lines(int num_bytes) { return (num_bytes + kLine - 1) / kLine; }

// Bytes of a page in one layer and KV head: its keys and its values.
constexpr int page_bytes(int head_dim, int block_size) {
    return block_size * 2 * head_dim * kNativeBytes;
}

// High records that hold this many tokens.
constexpr int high_records(int num_tokens) {
    return (num_tokens + kHighRecordTokens - 1) / kHighRecordTokens;
}

// Byte offsets in the header of a stream. The centres are at offset 0.
struct HeaderLayout {
    int units, order, num_lines;

    constexpr explicit HeaderLayout(int head_dim)
        : units(2 * head_dim), order(4 * head_dim), num_lines(lines(5 * head_dim)) {}
};

constexpr int header_lines(int head_dim) { return HeaderLayout(head_dim).num_lines; }
constexpr int kMaxHeader = header_lines(kMaxHeadDim) * kLine;  // bytes

// The key channels in a header, by rank.
struct KeyFrame {
    const uint16_t *center, *unit;  // fp16
    const uint8_t* order;           // the channel at each rank

    KeyFrame(const uint8_t* header, int head_dim)
        : center(reinterpret_cast<const uint16_t*>(header)),
          unit(reinterpret_cast<const uint16_t*>(header + HeaderLayout(head_dim).units)),
          order(header + HeaderLayout(head_dim).order) {}
};

// Byte offsets in a low record. The keys are at offset 0.
struct LowLayout {
    int head_dim, key_code, value_bits;
    int values, key_scales, key_zeros, value_scales, value_zeros, num_lines;

    // `key_code`: key bits by quarter of the channels, 4 bits each, and kKeysPerTokenBit.
    LowLayout(int head_dim, int key_code, int value_bits)
        : head_dim(head_dim), key_code(key_code), value_bits(value_bits) {
        values = 0;
        for (int band = 0; band < bands(); ++band) values += band_bits(band) * kLine;
        key_scales = values + kLowRecordTokens * head_dim * value_bits / 8;
        const int num_key_scales = keys_per_token() ? kLowRecordTokens : head_dim;
        key_zeros = key_scales + num_key_scales;
        value_scales = key_scales + lines(2 * num_key_scales) * kLine;
        value_zeros = value_scales + kLowRecordTokens * value_groups(head_dim);
        num_lines = lines(value_zeros + kLowRecordTokens * value_groups(head_dim));
    }
    int bands() const { return head_dim / kBandChannels; }
    // Keys have one scale per token, after division by the units of their channels.
    bool keys_per_token() const { return key_code >> kKeysPerTokenBit & 1; }
    // Bits of the keys in a band, which is also the number of lines that the band takes.
    int band_bits(int band) const { return key_code >> 4 * (4 * band / bands()) & 15; }
    static constexpr int value_groups(int head_dim) {
        return head_dim < kValueGroup ? 1 : head_dim / kValueGroup;
    }
};

// Byte offsets in a high record. The keys are at offset 0.
struct HighLayout {
    int head_dim, bits;
    int values, key_scales, value_scales, scores, num_lines;

    HighLayout(int head_dim, int bits) : head_dim(head_dim), bits(bits) {
        values = kHighRecordTokens * head_dim * bits / 8;
        key_scales = 2 * values;
        value_scales = key_scales + (bits == 8 ? 2 * kHighRecordTokens : 0);
        scores = value_scales + (bits == 8 ? 2 * kHighRecordTokens : 0);
        num_lines = lines(scores + 4 * kHighRecordTokens);
    }
    // First line of a record in the stream.
    int record_line(int record) const { return header_lines(head_dim) + record * num_lines; }
    // Line of its scores.
    int score_line(int record) const { return record_line(record) + num_lines - 1; }
};

}  // namespace mikv::MIKV_ISA
