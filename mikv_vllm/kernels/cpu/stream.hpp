// Access to a stream: the tiered pages of one request, in one layer and KV head, as one run of
// lines.
#pragma once

#include "api.hpp"
#include "layout.hpp"

namespace mikv::MIKV_ISA {

struct Stream {
    uint8_t* base;
    int64_t page_stride;
    const int32_t* table;
    uint32_t page_lines;

    Stream(const Cache& cache, const Layer& layer, int head, const int32_t* table)
        : base(cache.base + head * cache.head_stride),
          page_stride(cache.page_stride),
          table(table),
          page_lines(static_cast<uint32_t>(page_bytes(layer.head_dim, layer.block_size) / kLine)) {}

    // Address of a line; `rest` becomes the number of lines from there to the end of its page.
    uint8_t* at(int line, int* rest) const {
        const uint32_t page = static_cast<uint32_t>(line) / page_lines;
        const uint32_t start = static_cast<uint32_t>(line) - page * page_lines;
        *rest = static_cast<int>(page_lines - start);
        return base + table[page] * page_stride + start * kLine;
    }

    // Prefetches lines that will be read soon into the second-level cache. Always inlined: GCC
    // treats a function that only prefetches as one without effects, and removes the calls.
    [[gnu::always_inline]] void prefetch(int line, int count) const {
        while (count > 0) {
            int rest;
            const uint8_t* p = at(line, &rest);
            rest = rest < count ? rest : count;
            for (int i = 0; i < rest; ++i) __builtin_prefetch(p + i * kLine, 0, 2);
            line += rest, count -= rest;
        }
    }

    // The lines themselves if they are in one page, otherwise a copy of them in `buffer`.
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

// A record opened for writing. If it crosses a page boundary, `data` is a copy of it in `buffer`,
// which the destructor writes back.
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

}  // namespace mikv::MIKV_ISA
