// Interface between the Python module and the kernels of every instruction set: plain data and a
// table of functions.
#pragma once

#include <cstdint>

namespace mikv {

// Parameters of one attention layer.
struct Layer {
    int head_dim, num_heads, num_kv_heads, block_size, high_bits;
    int dtype;  // 0: bf16, 1: fp16
    float scale, softcap, decay;
    int recent;
    const float* sinks;                      // [num_heads] or null
    const int32_t *key_index, *value_index;  // [block_size, head_dim]: token, channel -> element
    const int32_t* key_index_by_channel;     // [head_dim, block_size]
    // Whether entries 16 * i .. 16 * i + 15 of the index are consecutive elements, for every i.
    bool key_runs, value_runs, key_runs_by_channel;

    int queries_per_kv_head() const { return num_heads / num_kv_heads; }
};

// Cache of one layer: page p of KV head h starts at base + p * page_stride + h * head_stride bytes.
struct Cache {
    uint8_t* base;
    int64_t page_stride, head_stride;
};

// One block of a compressed request in a decode step. Python writes it as one row of an int32
// array. The blocks of a request are consecutive rows with the same `token`.
struct Row {
    int32_t token;  // row of q, k, v and out
    int32_t num_pages;
    int32_t high_tokens, low_records, low_end_line;  // before the step
    int32_t demoted_records;
    int32_t key_code, value_bits;  // see LowLayout
    int32_t blocks;  // of the request, if this is its tail, which the new tokens join; else 0
    int32_t
        queries;  // new tokens of the request: rows token, token + 1, ..; all but one are drafts
    int32_t accepted;  // drafts of its last step that were accepted
    int32_t slot;      // of its draft weights

    bool is_tail() const { return blocks > 0; }
};

struct Batch {
    const Row* rows;
    int num_rows;
    const int32_t* tables;  // [num_rows, max_pages]
    int max_pages;
};

// A tensor [tokens, heads, head_dim] of 2-byte numbers; each row [heads, head_dim] is contiguous.
struct Rows {
    uint16_t* base;
    int64_t stride;  // numbers from one row to the next
    uint16_t* at(int64_t row) const { return base + row * stride; }
};

struct DecodeTensors {
    Rows q, k, v, out;
};

// Attention weights of drafts on the high tokens of their tails, summed over the query heads of a
// KV head: [slots, kv_heads, drafts, high tokens]. They join the scores once the drafts are
// accepted.
struct DraftWeights {
    float* base;
    int64_t slot_stride, head_stride, draft_stride;  // in numbers
    float* at(int slot, int head, int draft) const {
        return base + slot * slot_stride + head * head_stride + draft * draft_stride;
    }
};

// A native request to compress in one layer.
struct Compression {
    const int32_t *native_table, *tiered_table;
    int num_tokens, tiered_pages;
    int high_tokens, low_records, low_end_line;  // sizes to reach
    int key_code, value_bits;
    int recent;           // newest tokens that stay high
    const float* scores;  // [num_kv_heads, score_stride]
    int64_t score_stride;
    Rows queries;  // the last queries of the prompt, at least one
    int num_queries;
};

// A compressed request in one layer: its block table, sizes and format.
struct Tiers {
    const int32_t* table;
    int high_tokens, low_records, low_end_line;
    int key_code, value_bits;
};

// The next chunk of a prompt, whose tokens join the tiers of a compressed request.
struct Extension {
    Tiers tiers;  // before the step
    int demoted_records;
    Rows k, v;
    int num_tokens;
    const float* scores;  // [num_kv_heads, score_stride]: tokens of the tiers, then new tokens
    int64_t score_stride;
    int recent;  // newest tokens that stay high
    float keep;  // factor on the stored scores of the high tokens, before `scores` is added
};

// The kernels of one instruction set.
struct Kernels {
    const char* name;
    void (*decode)(const Layer&, const Cache&, const Batch&, const DecodeTensors&,
                   const DraftWeights&);
    // Adds to scores [num_kv_heads, score_stride].
    void (*score)(const Layer&, const Cache&, const int32_t* table, int num_tokens, Rows queries,
                  int num_queries, float* scores, int64_t score_stride);
    void (*compress)(const Layer&, const Cache&, const Compression&);
    // Writes the tokens of the tiers, high then low, to the native pages 0, 1, .. of `target`.
    void (*restore)(const Layer&, const Cache&, const Tiers&, const Cache& target);
    void (*extend)(const Layer&, const Cache&, const Extension&);
};

namespace scalar {
extern const Kernels kernels;
}
#if defined(MIKV_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
#endif

}  // namespace mikv
