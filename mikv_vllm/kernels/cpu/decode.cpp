// The fused decode step of one layer: changes the tiers of each request, computes attention, and
// updates the importance scores.
#include <omp.h>

#include <utility>

#include "attend.hpp"
#include "change.hpp"
#include "kernels.hpp"

namespace mikv::MIKV_ISA {
namespace {

constexpr int kHeadsAtOnce = kAmx ? 8 : 4;  // query heads whose sums fit into registers
constexpr int kLeastPartTokens = 512;       // smaller parts cost more to merge than they save

// One request and one KV head of a step.
struct Item {
    const Row* row;
    int head;
    Stream stream;
    LowLayout low;
    Sizes sizes;  // after the changes
};

struct Step {
    const Layer& layer;
    const Cache& cache;
    const Batch& batch;
    const DecodeTensors& tensors;
    HighLayout high;
    int parts;
    int stride;  // of the kept weights of high tokens

    Item item(int index) const {
        const Row* row = batch.rows + index / layer.num_kv_heads;
        const int head = index % layer.num_kv_heads;
        const int32_t* table =
            batch.tables + static_cast<int64_t>(row - batch.rows) * batch.max_pages;
        return {row,
                head,
                Stream(cache, layer, head, table),
                LowLayout(layer.head_dim, row->key_code, row->value_bits),
                {row->high_tokens - kLowRecordTokens * row->demoted_records + 1,
                 row->low_records + row->demoted_records, row->low_end_line_after}};
    }

    size_t weights_bytes() const {
        return static_cast<size_t>(layer.queries_per_kv_head() * stride) * 4;
    }
    size_t partial_bytes() const {
        return static_cast<size_t>(layer.queries_per_kv_head()) * (layer.head_dim * 4 + 64);
    }
    Partial partial(uint8_t* memory, int part) const {
        const int query_heads = layer.queries_per_kv_head();
        float* out = reinterpret_cast<float*>(memory + part * partial_bytes());
        float* top = out + query_heads * layer.head_dim;
        return {out, top, top + query_heads, top + 2 * query_heads};
    }

    void change(const Item& item, ChangeScratch& scratch) const {
        const Row& row = *item.row;
        Sizes sizes{row.high_tokens, row.low_records, row.low_end_line};
        move_low_records(item.stream, item.low, sizes, row.moved_records, row.low_end_line_after,
                         scratch.source);
        for (int i = 0; i < row.demoted_records; ++i) {
            demote(layer, item.stream, high, item.low, sizes, scratch);
        }
        const int64_t at = static_cast<int64_t>(item.head) * layer.head_dim;
        append(layer, item.stream, high, sizes, tensors.k.at(row.token) + at,
               tensors.v.at(row.token) + at, 0.0f, scratch.source);
    }

    Part range(const Item& item, int part) const {
        const Sizes& sizes = item.sizes;
        const int high_count = high_records(sizes.high_tokens);
        return {.high_record_begin = high_count * part / parts,
                .high_record_end = high_count * (part + 1) / parts,
                .high_tokens = sizes.high_tokens,
                .low_record_begin = sizes.low_records * part / parts,
                .low_record_end = sizes.low_records * (part + 1) / parts,
                .low_start_line = sizes.low_record_line(item.low, 0)};
    }

    template <int D, int G>
    void attend_heads(const Item& item, int part, int first, float* weights, Partial partial,
                      uint8_t* scratch) const {
        const int head = item.head * layer.queries_per_kv_head() + first;
        const Part range = this->range(item, part);
        const float* sinks = layer.sinks && part == 0 ? layer.sinks + head : nullptr;
        Attention<D, G> attention(layer, item.stream, high, item.low,
                                  *reinterpret_cast<AttendState<D, G>*>(scratch));
        attention.run(tensors.q.at(item.row->token) + head * D, sinks, range,
                      weights + first * stride + range.high_record_begin * kHighRecordTokens,
                      stride,
                      {partial.out + first * D, partial.top + first, partial.total + first,
                       partial.high_top + first});
    }

    template <int D>
    void attend(const Item& item, int part, float* weights, Partial partial,
                uint8_t* scratch) const {
        const int query_heads = layer.queries_per_kv_head();
        for (int first = 0; first < query_heads;) {
            // Shares of similar size: 5 heads run as 3 + 2, not as 4 + 1.
            const int runs = (query_heads - first + kHeadsAtOnce - 1) / kHeadsAtOnce;
            const int count = (query_heads - first + runs - 1) / runs;
            [&]<int... G>(std::integer_sequence<int, G...>) {
                const auto run = [&]<int Count>() {
                    attend_heads<D, Count>(item, part, first, weights, partial, scratch);
                    return true;
                };
                (void)((count == G + 1 && run.template operator()<G + 1>()) || ...);
            }(std::make_integer_sequence<int, kHeadsAtOnce>());
            first += count;
        }
    }

    void attend(const Item& item, int part, float* weights, Partial partial,
                uint8_t* scratch) const {
        switch (layer.head_dim) {
            case 64: return attend<64>(item, part, weights, partial, scratch);
            case 80: return attend<80>(item, part, weights, partial, scratch);
            case 96: return attend<96>(item, part, weights, partial, scratch);
            case 128: return attend<128>(item, part, weights, partial, scratch);
            default: return attend<256>(item, part, weights, partial, scratch);
        }
    }

    // Merges the parts, writes the output and adds the normalized weights to the scores.
    void finish(const Item& item, const float* weights, uint8_t* partials) const {
        const int query_heads = layer.queries_per_kv_head(), d = layer.head_dim;
        for (int g = 0; g < query_heads; ++g) {
            float top = kNever, total = 0.0f;
            for (int p = 0; p < parts; ++p) {
                const float other = partial(partials, p).top[g];
                top = other > top ? other : top;
            }
            for (int p = 0; p < parts; ++p) {
                const Partial x = partial(partials, p);
                total += x.total[g] * __builtin_exp2f(x.top[g] - top);
            }
            const int64_t head = item.head * query_heads + g;
            uint16_t* out = tensors.out.at(item.row->token) + head * d;
            alignas(64) float merged[kMaxHeadDim];
            for (int p = 0; p < parts; ++p) {
                const Partial x = partial(partials, p);
                const F share = splat(__builtin_exp2f(x.top[g] - top) / total);
                for (int c = 0; c < d; c += 16) {
                    const F before = p ? load(merged + c) : splat(0.0f);
                    store(merged + c, fma(load(x.out + g * d + c), share, before));
                }
                // From here on, high_top is the factor on the kept weights of this part.
                x.high_top[g] = __builtin_exp2f(x.high_top[g] - top) / total;
            }
            for (int c = 0; c < d; c += 16) store_half(out + c, load(merged + c), layer.dtype);
        }
        for (int p = 0; p < parts; ++p) {
            const Partial x = partial(partials, p);
            const Part range = this->range(item, p);
            for (int at = range.high_record_begin; at < range.high_record_end; ++at) {
                int rest;
                float* scores =
                    reinterpret_cast<float*>(item.stream.at(high.score_line(at), &rest));
                F score = mul(load(scores), splat(layer.decay));
                for (int g = 0; g < query_heads; ++g) {
                    const F w = load(weights + g * stride + at * kHighRecordTokens);
                    score = fma(w, splat(x.high_top[g]), score);
                }
                store(scores, score);
            }
        }
    }
};

template <int D> constexpr size_t attend_bytes() { return sizeof(AttendState<D, kHeadsAtOnce>); }

size_t attend_bytes(int head_dim) {
    switch (head_dim) {
        case 64: return attend_bytes<64>();
        case 80: return attend_bytes<80>();
        case 96: return attend_bytes<96>();
        case 128: return attend_bytes<128>();
        default: return attend_bytes<256>();
    }
}

}  // namespace

void decode(const Layer& layer, const Cache& cache, const Batch& batch,
            const DecodeTensors& tensors) {
    const int threads = omp_get_max_threads(), items = batch.num_rows * layer.num_kv_heads;
    int max_high = 0, max_tokens = 0;
    for (int r = 0; r < batch.num_rows; ++r) {
        const Row& row = batch.rows[r];
        const int tokens = row.high_tokens + kLowRecordTokens * row.low_records;
        max_high = row.high_tokens > max_high ? row.high_tokens : max_high;
        max_tokens = tokens > max_tokens ? tokens : max_tokens;
    }
    // A small number of items is split into parts, so that all threads finish at about the same
    // time.
    int parts = 1;
    if (threads > 1 && items < 4 * threads) {
        parts = (4 * threads + items - 1) / items;
        const int most = 1 + max_tokens / kLeastPartTokens;
        parts = parts < most ? parts : most;
    }
    const Step step{layer,
                    cache,
                    batch,
                    tensors,
                    HighLayout(layer.head_dim, layer.high_bits),
                    parts,
                    high_records(max_high + 1) * kHighRecordTokens};

    const size_t item_bytes = step.weights_bytes() + parts * step.partial_bytes();
    const size_t change_bytes = ChangeScratch::bytes(max_high);
    const size_t thread_bytes =
        (change_bytes + attend_bytes(layer.head_dim) + item_bytes + 4095) / 4096 * 4096;
    const size_t shared_bytes = parts > 1 ? items * item_bytes : 0;
    uint8_t* memory = scratch_memory(threads * thread_bytes + shared_bytes);

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Arena arena{memory + static_cast<size_t>(omp_get_thread_num()) * thread_bytes};
        ChangeScratch* change = ChangeScratch::make(arena, max_high);
        uint8_t* scratch = arena.take<uint8_t>(attend_bytes(layer.head_dim));
        uint8_t* own = arena.take<uint8_t>(item_bytes);
        if (parts == 1) {
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < items; ++i) {
                const Item item = step.item(i);
                step.change(item, *change);
                float* weights = reinterpret_cast<float*>(own);
                uint8_t* partials = own + step.weights_bytes();
                step.attend(item, 0, weights, step.partial(partials, 0), scratch);
                step.finish(item, weights, partials);
            }
        } else {
            uint8_t* shared = memory + threads * thread_bytes;
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < items; ++i) step.change(step.item(i), *change);
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < items * parts; ++i) {
                uint8_t* mine = shared + static_cast<size_t>(i / parts) * item_bytes;
                step.attend(step.item(i / parts), i % parts, reinterpret_cast<float*>(mine),
                            step.partial(mine + step.weights_bytes(), i % parts), scratch);
            }
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < items; ++i) {
                uint8_t* mine = shared + static_cast<size_t>(i) * item_bytes;
                step.finish(step.item(i), reinterpret_cast<float*>(mine),
                            mine + step.weights_bytes());
            }
        }
    }
}

}  // namespace mikv::MIKV_ISA
