// Importance of a prompt's tokens: the attention that its last queries pay to each.
//
// Importance of the tokens of a native request: the attention weights that they receive.
//
// The threads share the work of each KV head, split along the tokens. Rows, each one query of one
// query head, are computed in blocks whose logits fit into the cache: logits, then exponentials,
// then sums over the rows.
#include <omp.h>

#include "arena.hpp"
#include "kernels.hpp"
#include "logits.hpp"
#include "native.hpp"

namespace mikv::MIKV_ISA {
namespace {

constexpr int kTile = 64;                     // tokens
constexpr size_t kLogitsBytes = 1024 * 1024;  // of a block of rows

struct Scoring {
    const Layer& layer;
    NativePages pages;
    int num_tokens, num_queries, tiles, rows_at_once;
    Rows queries;
    float* scores;
    int64_t score_stride;

    float* keys;           // [tiles][head_dim][kTile]
    float* logits;         // [tiles][rows_at_once][kTile]
    float* block;          // [rows_at_once][head_dim], scaled queries
    float *tops, *totals;  // [threads][rows_at_once][16]

    int query_heads() const { return layer.queries_per_kv_head(); }
    // Query head of a row; row r is query r / query_heads() of query head r % query_heads().
    int query_head(int head, int row) const { return head * query_heads() + row % query_heads(); }

    // Copies the keys of one page to `keys`.
    void gather(int head, int page) const {
        const int size = layer.block_size, d = layer.head_dim;
        const uint16_t* region = pages.region(page, head);
        for (int c = 0; c < d; ++c) {
            for (int t = 0; t < size; t += 16) {
                const int token = page * size + t;
                if (token >= num_tokens) break;
                store(keys + (static_cast<int64_t>(token / kTile) * d + c) * kTile + token % kTile,
                      load_indexed(region, layer.key_index_by_channel + c * size + t,
                                   layer.key_runs_by_channel, layer.dtype));
            }
        }
    }

    void load_queries(int head, int first, int count) const {
        const int d = layer.head_dim;
        for (int r = 0; r < rows_at_once; ++r) {
            float* to = block + r * d;
            const int row = first + r;
            const uint16_t* from =
                queries.at(row / query_heads()) + static_cast<int64_t>(query_head(head, row)) * d;
            for (int c = 0; c < d; c += 16) {
                store(to + c, r < count ? mul(load_half(from + c, layer.dtype), splat(layer.scale))
                                        : splat(0.0f));
            }
        }
    }

    int position(int row) const { return num_tokens - num_queries + row / query_heads(); }

    // Computes the logits of a tile, and raises `top` to the largest logit of each row.
    void products(int tile, int first, int count, float* top) const {
        const int d = layer.head_dim;
        const float* k = keys + static_cast<int64_t>(tile) * d * kTile;
        float* out = logits + static_cast<int64_t>(tile) * rows_at_once * kTile;
        for (int r = 0; r < count; r += kScoreRows) {
            const float* q = block + r * d;
            for (int t = 0; t < kTile; t += 16 * kScoreVectors) {
                F acc[kScoreRows][kScoreVectors];
                for (auto& row : acc) {
                    for (F& x : row) x = splat(0.0f);
                }
                for (int c = 0; c < d; ++c) {
                    F key[kScoreVectors];
                    for (int v = 0; v < kScoreVectors; ++v)
                        key[v] = load(k + c * kTile + t + 16 * v);
                    for (int i = 0; i < kScoreRows; ++i) {
                        const F x = splat(q[i * d + c]);
                        for (int v = 0; v < kScoreVectors; ++v)
                            acc[i][v] = fma(x, key[v], acc[i][v]);
                    }
                }
                for (int i = 0; i < kScoreRows; ++i) {
                    F most = load(top + (r + i) * 16);
                    for (int v = 0; v < kScoreVectors; ++v) {
                        const int token = tile * kTile + t + 16 * v;
                        const int seen = position(first + r + i) + 1 - token;
                        F x = acc[i][v];
                        if (layer.softcap != 0.0f) x = soft_cap(x, layer.softcap, 1.0f);
                        x = first_lanes(x, seen < 0 ? 0 : seen > 16 ? 16 : seen, splat(kNever));
                        most = vmax(most, x);
                        store(out + (r + i) * kTile + t + 16 * v, x);
                    }
                    store(top + (r + i) * 16, most);
                }
            }
        }
    }

    // Replaces the logits of a tile by exp(logit - top), and adds these to `total`.
    void exponentials(int tile, int count, const float* top, float* total) const {
        float* x = logits + static_cast<int64_t>(tile) * rows_at_once * kTile;
        for (int r = 0; r < count; ++r) {
            F all = load(total + r * 16);
            for (int t = 0; t < kTile; t += 16) {
                const F logit = load(x + r * kTile + t);
                const F e = exp2(mul(sub(logit, splat(top[r])), splat(kLog2E)));
                all = add(all, e);
                store(x + r * kTile + t, e);
            }
            store(total + r * 16, all);
        }
    }

    // Adds the weights of a tile to the scores. `share`: factor from exponentials to weights.
    void sums(int head, int tile, int count, const float* share) const {
        const float* x = logits + static_cast<int64_t>(tile) * rows_at_once * kTile;
        for (int t = 0; t < kTile; t += 16) {
            const int token = tile * kTile + t, rest = num_tokens - token;
            if (rest <= 0) break;
            F all = splat(0.0f);
            for (int r = 0; r < count; ++r) {
                all = fma(load(x + r * kTile + t), splat(share[r]), all);
            }
            float* to = scores + head * score_stride + token;
            if (rest >= 16) {
                store(to, add(load(to), all));
            } else {
                alignas(64) float lanes[16];
                store(lanes, all);
                for (int i = 0; i < rest; ++i) to[i] += lanes[i];
            }
        }
    }

    void score_rows(int head, int first, int count, int threads) const {
        const int thread = omp_get_thread_num();
        float* top = tops + static_cast<int64_t>(thread) * rows_at_once * 16;
        float* total = totals + static_cast<int64_t>(thread) * rows_at_once * 16;
        for (int i = 0; i < rows_at_once; ++i) {
            store(top + 16 * i, splat(kNever));
            store(total + 16 * i, splat(0.0f));
        }
        const int last = position(first + count - 1) / kTile + 1;
#pragma omp single
        load_queries(head, first, count);
#pragma omp for schedule(static)
        for (int tile = 0; tile < last; ++tile) products(tile, first, count, top);

        // Every thread computes the maxima of all rows. The loop above ends with a barrier.
        float most[kMostRows], share[kMostRows];
        for (int r = 0; r < count; ++r) {
            F x = splat(kNever);
            for (int i = 0; i < threads; ++i) {
                x = vmax(x, load(tops + (static_cast<int64_t>(i) * rows_at_once + r) * 16));
            }
            most[r] = largest(x);
            if (layer.sinks) {
                const float sink = layer.sinks[query_head(head, first + r)];
                most[r] = sink > most[r] ? sink : most[r];
            }
        }
#pragma omp for schedule(static)
        for (int tile = 0; tile < last; ++tile) exponentials(tile, count, most, total);
        for (int r = 0; r < count; ++r) {
            F x = splat(0.0f);
            for (int i = 0; i < threads; ++i) {
                x = add(x, load(totals + (static_cast<int64_t>(i) * rows_at_once + r) * 16));
            }
            float all = sum(x);
            if (layer.sinks) {
                all += __builtin_expf(layer.sinks[query_head(head, first + r)] - most[r]);
            }
            share[r] = 1.0f / all;
        }
#pragma omp for schedule(static)
        for (int tile = 0; tile < last; ++tile) sums(head, tile, count, share);
    }

    static constexpr int kMostRows = 96;
};

}  // namespace

void score(const Layer& layer, const Cache& cache, const int32_t* table, int num_tokens,
           Rows queries, int num_queries, float* scores, int64_t score_stride) {
    const int threads = omp_get_max_threads(), rows = num_queries * layer.queries_per_kv_head();
    const int tiles = (num_tokens + kTile - 1) / kTile;
    const size_t row_bytes = static_cast<size_t>(tiles) * kTile * 4;
    int at_once = static_cast<int>(kLogitsBytes / row_bytes);
    at_once = at_once < 12 ? 12 : at_once > Scoring::kMostRows ? Scoring::kMostRows : at_once;
    at_once = at_once / kScoreRows * kScoreRows;

    const size_t keys_bytes = row_bytes * layer.head_dim, logits_bytes = row_bytes * at_once;
    const size_t block_bytes = static_cast<size_t>(at_once) * layer.head_dim * 4;
    const size_t lanes_bytes = static_cast<size_t>(threads) * at_once * 64;
    Arena arena{scratch_memory(keys_bytes + logits_bytes + block_bytes + 2 * lanes_bytes)};
    const Scoring s{layer,
                    {layer, cache, table},
                    num_tokens,
                    num_queries,
                    tiles,
                    at_once,
                    queries,
                    scores,
                    score_stride,
                    arena.take<float>(keys_bytes / 4),
                    arena.take<float>(logits_bytes / 4),
                    arena.take<float>(block_bytes / 4),
                    arena.take<float>(lanes_bytes / 4),
                    arena.take<float>(lanes_bytes / 4)};
    const int pages = (num_tokens + layer.block_size - 1) / layer.block_size;

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int team = omp_get_num_threads();
        for (int head = 0; head < layer.num_kv_heads; ++head) {
#pragma omp for schedule(static)
            for (int page = 0; page < pages; ++page) s.gather(head, page);
            for (int first = 0; first < rows; first += at_once) {
                const int rest = rows - first;
                s.score_rows(head, first, rest < at_once ? rest : at_once, team);
            }
        }
    }
}

}  // namespace mikv::MIKV_ISA
