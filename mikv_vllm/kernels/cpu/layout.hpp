// Where things lie in a stream: the C++ face of tiers/formats.py.
#pragma once

#include "api.hpp"
#include "simd.hpp"

namespace mikv::MIKV_ISA {

constexpr int kLine = 64;
constexpr int kLowRecordTokens = 32;  // tokens of a low record
constexpr int kHighRecordTokens = 16;  // tokens of a high record

constexpr int lines(int num_bytes) { return (num_bytes + kLine - 1) / kLine; }

// A key's zero point is stored in units of its scale divided by this.
constexpr int kKeyZeroSteps = 2;

constexpr int kBand = 16;  // key channels, neighbours by rank, that share their bits

// Lines of a stream's header.
constexpr int header_lines(int head_dim) { return lines(5 * head_dim); }
// A copy of one has room for this many bytes.
constexpr int kHeader = 5 * 256;

// What a header holds of the key channels, by rank.
struct KeyFrame {
    const uint16_t *center, *unit;  // fp16
    const uint8_t* order;           // which channels they are

    KeyFrame(const uint8_t* header, int head_dim)
        : center(reinterpret_cast<const uint16_t*>(header)),
          unit(center + head_dim),
          order(header + 4 * head_dim) {}
};

// Byte offsets in a low record.
struct LowLayout {
    int head_dim, key_code, value_bits;
    int values, key_scales, key_zeros, value_scales, value_zeros, num_lines;

    // `key_code`: the keys' bits by quarter of the channels, 4 bits each; bit 16: balanced.
    LowLayout(int head_dim, int key_code, int value_bits)
        : head_dim(head_dim), key_code(key_code), value_bits(value_bits) {
        const int groups = value_groups(head_dim);
        values = 0;
        for (int band = 0; band < bands(); ++band) values += band_bits(band) * kLine;
        key_scales = values + kLowRecordTokens * head_dim * value_bits / 8;
        const int key_slices = keys_per_token() ? kLowRecordTokens : head_dim;
        key_zeros = key_scales + key_slices;
        value_scales = key_scales + lines(2 * key_slices) * kLine;
        value_zeros = value_scales + kLowRecordTokens * groups;
        num_lines = lines(value_zeros + kLowRecordTokens * groups);
    }
    int bands() const { return head_dim / kBand; }
    // Keys have scales per token, in units of their channels, not per channel.
    bool keys_per_token() const { return key_code >> 16 & 1; }
    // A band of as many bits has as many lines.
    int band_bits(int band) const { return key_code >> 4 * (4 * band / bands()) & 15; }
    static constexpr int value_groups(int head_dim) { return head_dim < 64 ? 1 : head_dim / 64; }
};

// Byte offsets in a high record.
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
    // First line of a group.
    int high_record_line(int group) const { return header_lines(head_dim) + group * num_lines; }
};

// The pages of one request in one layer and head, as one run of lines.
struct Stream {
    uint8_t* base;
    int64_t page_stride;
    const int32_t* table;
    uint32_t page_lines;

    Stream(const Cache& cache, const Layer& layer, int head, const int32_t* table)
        : base(cache.base + head * cache.head_stride),
          page_stride(cache.page_stride),
          table(table),
          page_lines(static_cast<uint32_t>(layer.page_bytes() / kLine)) {}

    // Address of a line, and how many lines follow from there in its page.
    uint8_t* at(int line, int* rest) const {
        const uint32_t page = static_cast<uint32_t>(line) / page_lines;
        const uint32_t start = static_cast<uint32_t>(line) - page * page_lines;
        *rest = static_cast<int>(page_lines - start);
        return base + table[page] * page_stride + start * kLine;
    }

    // Asks for lines that will be read soon, into the second-level cache. Inlined by force: GCC
    // takes a function that only prefetches for one without effects, and drops the calls.
    [[gnu::always_inline]] void prefetch(int line, int count) const {
        while (count > 0) {
            int rest;
            const uint8_t* p = at(line, &rest);
            rest = rest < count ? rest : count;
            for (int i = 0; i < rest; ++i) __builtin_prefetch(p + i * kLine, 0, 2);
            line += rest, count -= rest;
        }
    }

    // The record itself if it lies in one page, else a copy of it in `buffer`.
    const uint8_t* view(int line, int count, uint8_t* buffer) const {
        int rest;
        const uint8_t* p = at(line, &rest);
        if (__builtin_expect(rest >= count, 1)) return p;
        read(line, count, buffer);
        return buffer;
    }

    void read(int line, int count, uint8_t* to) const {
        while (count) {
            int rest;
            const uint8_t* p = at(line, &rest);
            rest = rest < count ? rest : count;
            __builtin_memcpy(to, p, static_cast<size_t>(rest) * kLine);
            line += rest, count -= rest, to += rest * kLine;
        }
    }

    void write(int line, int count, const uint8_t* from) const {
        while (count) {
            int rest;
            uint8_t* p = at(line, &rest);
            rest = rest < count ? rest : count;
            __builtin_memcpy(p, from, static_cast<size_t>(rest) * kLine);
            line += rest, count -= rest, from += rest * kLine;
        }
    }
};

// A record opened for change: written back when it had to be copied.
class Editor {
  public:
    Editor(const Stream& stream, int line, int count, uint8_t* buffer)
        : stream_(stream), line_(line), count_(count) {
        int rest;
        data = stream.at(line, &rest);
        copied_ = rest < count;
        if (copied_) {
            data = buffer;
            stream.read(line, count, buffer);
        }
    }
    ~Editor() {
        if (copied_) stream_.write(line_, count_, data);
    }
    Editor(const Editor&) = delete;
    Editor& operator=(const Editor&) = delete;
    uint8_t* data;

  private:
    const Stream& stream_;
    int line_, count_;
    bool copied_;
};

// Hands out parts of a block of memory, 64-byte aligned.
struct Arena {
    uint8_t* next;
    template <class T> T* take(size_t count) {
        T* result = reinterpret_cast<T*>(next);
        next += (count * sizeof(T) + kLine - 1) / kLine * kLine;
        return result;
    }
};

}  // namespace mikv::MIKV_ISA
