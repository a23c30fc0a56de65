// What the Python module and the kernels of every ISA agree on: plain data and a table of functions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mikv {

// One attention layer's parameters.
struct Layer {
    int head_dim, num_heads, num_kv_heads, block_size, high_bits;
    int dtype;  // 0: bf16, 1: fp16
    float scale, softcap, decay;
    int recent;
    const float* sinks;                          // [num_heads] or null
    const int32_t *key_index, *value_index;      // [block_size, head_dim]: token, channel -> element
    const int32_t* key_index_by_channel;         // [head_dim, block_size]
    // Whether runs of 16 entries of an index, from a multiple of 16, are consecutive elements.
    bool key_runs, value_runs, key_runs_by_channel;

    int queries_per_kv_head() const { return num_heads / num_kv_heads; }
    int page_bytes() const { return block_size * 4 * head_dim; }
};

// One layer's cache: page p of head h starts at base + p * page_stride + h * head_stride.
struct Cache {
    uint8_t* base;
    int64_t page_stride, head_stride;
};

// One compressed request in a decode step. Offsets count 64-byte lines. The Python side writes
// these as rows of an int32 array.
struct Row {
    int32_t token;  // row of q, k, v and out
    int32_t num_pages;
    int32_t high_tokens, low_records, low_end_line;  // before the step
    int32_t moved_records, demoted_records;
    int32_t low_end_line_after;
    int32_t key_code, value_bits;  // key_code: see LowLayout
};

struct Batch {
    const Row* rows;
    int num_rows;
    const int32_t* tables;  // [num_rows, max_pages]
    int max_pages;
};

// Rows of one 2-byte tensor [tokens, heads, head_dim]; heads are contiguous inside a row.
struct Rows {
    uint16_t* base;
    int64_t stride;  // in numbers
    uint16_t* at(int64_t row) const { return base + row * stride; }
};

struct DecodeTensors {
    Rows q, k, v, out;
};

// A request to compress, in one layer.
struct Compression {
    const int32_t *native_table, *tiered_table;
    int num_tokens, tiered_pages;
    int high_tokens, low_records, low_end_line;  // sizes to reach; low_end_line in lines
    int key_code, value_bits;
    const float* scores;  // [num_kv_heads, score_stride]
    int64_t score_stride;
    Rows queries;  // the prompt's last ones, at least one
    int num_queries;
};

// A compressed request in one layer: its block table, sizes and format.
struct Tiers {
    const int32_t* table;
    int high_tokens, low_records, low_end_line;  // low_end_line in lines
    int key_code, value_bits;
};

// Tokens of a prompt's next chunk that join the tiers of what came before.
struct Extension {
    Tiers tiers;  // before
    int moved_records, demoted_records, low_end_line_after;
    Rows k, v;
    int num_tokens;
    const float* scores;  // [num_kv_heads, score_stride]: of the tiers' tokens, then the new ones'
    int64_t score_stride;
    float keep;  // factor on the high tokens' own scores, to which theirs are added
};

struct Kernels {
    const char* name;
    void (*decode)(const Layer&, const Cache&, const Batch&, const DecodeTensors&);
    // Adds to scores [num_kv_heads, score_stride].
    void (*score)(const Layer&, const Cache&, const int32_t* table, int num_tokens, Rows queries,
                  int num_queries, float* scores, int64_t score_stride);
    void (*compress)(const Layer&, const Cache&, const Compression&);
    // Writes every token of the tiers to the native pages 0, 1, .. of `target`: high, then low.
    void (*restore)(const Layer&, const Cache&, const Tiers&, const Cache& target);
    void (*extend)(const Layer&, const Cache&, const Extension&);
};

namespace scalar { extern const Kernels kernels; }
#if defined(MIKV_X86)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels; }
#endif

// Memory that a call works in, kept for the next call of the same thread. 64-byte aligned.
uint8_t* workspace(size_t num_bytes);

// Choice of tokens by importance; `keys` is scratch of one number a token. Scores that are equal
// go by position, as in tiers/reference.py. Both set chosen[i] to 1 or 0.
void select_high(const float* scores, int num_tokens, int num_high, int recent, uint64_t* keys,
                 uint8_t* chosen);
void select_least(const float* scores, int num_tokens, int count, uint64_t* keys, uint8_t* chosen);

// Channels by falling cost; equal ones by their number.
void order_by_cost(const float* cost, int num_channels, int32_t* order);

}  // namespace mikv
