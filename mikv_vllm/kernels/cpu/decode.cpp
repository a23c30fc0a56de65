// The fused decode step of one layer: changes the tiers of each request, computes attention, and
// updates the importance scores. A request with drafts has several queries, which attend to the
// same tiers, each to one high token more than the one before.
#include <omp.h>

#include <utility>
#include <vector>

#include "attend.hpp"
#include "change.hpp"
#include "kernels.hpp"

namespace mikv::MIKV_ISA {
namespace {

constexpr int kHeadsAtOnce = kAmx ? 8 : 4;  // query heads whose sums fit into registers
constexpr int kLeastPartTokens = 512;       // smaller parts cost more to merge than they save

// The rows of one request.
struct Request {
    const Row *begin, *end;
    int64_t num_tokens;  // after the first new token

    const Row& last() const { return end[-1]; }
};

// One new token of a request: 0, or the number of a draft.
struct Query {
    int request, draft;
};

// One query and one KV head of a step.
struct Item {
    const Request* request;
    int head, draft;

    int token() const { return request->last().token + draft; }
    int64_t num_tokens() const { return request->num_tokens + draft; }
};

// One block of an item.
struct Block {
    Stream stream;
    LowLayout low;
    Sizes sizes;  // after the changes
};

struct Step {
    const Layer& layer;
    const Cache& cache;
    const Batch& batch;
    const DecodeTensors& tensors;
    const DraftWeights& drafts;
    const Request* requests;
    const Query* queries;
    HighLayout high;
    int parts;
    int stride;  // of the weights of high tokens

    Item item(int index) const {
        const Query& query = queries[index / layer.num_kv_heads];
        return {requests + query.request, index % layer.num_kv_heads, query.draft};
    }

    // With the new tokens up to `draft`.
    static Sizes sizes_after(const Row& row, int draft) {
        const int joined = row.is_tail() ? 1 + draft : 0;
        return {row.high_tokens - kLowRecordTokens * row.demoted_records + joined,
                row.low_records + row.demoted_records, row.low_end_line};
    }

    Block block(const Row& row, int head, int draft) const {
        const int32_t* table =
            batch.tables + static_cast<int64_t>(&row - batch.rows) * batch.max_pages;
        return {Stream(cache, layer, head, table),
                LowLayout(layer.head_dim, row.key_code, row.value_bits), sizes_after(row, draft)};
    }

    size_t weights_bytes() const {
        return static_cast<size_t>(layer.queries_per_kv_head() * stride) * 4;
    }
    // Of the high tokens of blocks that are only read: they are not kept.
    size_t read_weights_bytes() const { return static_cast<size_t>(kHeadsAtOnce * stride) * 4; }
    size_t partial_bytes() const {
        return static_cast<size_t>(layer.queries_per_kv_head()) * (layer.head_dim * 4 + 64);
    }
    Partial partial(uint8_t* memory, int part) const {
        const int query_heads = layer.queries_per_kv_head();
        float* out = reinterpret_cast<float*>(memory + part * partial_bytes());
        float* top = out + query_heads * layer.head_dim;
        return {out, top, top + query_heads, top + 2 * query_heads};
    }

    // Changes the tail of a request for one KV head, for all its new tokens.
    void change(const Request& request, int head, ChangeScratch& scratch) const {
        const Row& row = request.last();
        if (!row.is_tail()) return;
        const Block block = this->block(row, head, 0);
        Sizes sizes{row.high_tokens, row.low_records, row.low_end_line};
        score_accepted(row, head, block.stream);
        for (int i = 0; i < row.demoted_records; ++i) {
            demote(layer, block.stream, high, block.low, sizes, scratch);
        }
        const int64_t at = static_cast<int64_t>(head) * layer.head_dim;
        for (int token = row.token; token < row.token + row.queries; ++token) {
            append(layer, block.stream, high, sizes, tensors.k.at(token) + at,
                   tensors.v.at(token) + at, 0.0f, scratch.source);
        }
    }

    // Adds the weights of accepted drafts to the scores, one decode step for each.
    void score_accepted(const Row& row, int head, const Stream& stream) const {
        for (int draft = 0; draft < row.accepted; ++draft) {
            const float* weights = drafts.at(row.slot, head, draft);
            const int high_tokens = row.high_tokens - row.accepted + draft + 1;
            for (int at = 0; at < high_records(high_tokens); ++at) {
                int rest;
                float* scores = reinterpret_cast<float*>(stream.at(high.score_line(at), &rest));
                const F weight = load(weights + at * kHighRecordTokens);
                store(scores, fma(load(scores), splat(layer.decay), weight));
            }
        }
    }

    // The part of a block, of which `before` tokens of the request are in earlier blocks. Parts
    // have equal shares of the tokens of the request.
    Part range(const Item& item, const Block& block, int64_t before, int part) const {
        const Sizes& sizes = block.sizes;
        const int64_t tokens = sizes.num_tokens();
        const auto bound = [&](int p) {
            const int64_t token = item.num_tokens() * p / parts - before;
            return token < 0 ? 0 : token > tokens ? tokens : token;
        };
        const int64_t begin = bound(part), end = bound(part + 1);
        const int high_count = high_records(sizes.high_tokens);
        const auto share = [&](int records, int64_t token) {
            return static_cast<int>(records * token / tokens);
        };
        return {.high_record_begin = share(high_count, begin),
                .high_record_end = share(high_count, end),
                .high_tokens = sizes.high_tokens,
                .low_record_begin = share(sizes.low_records, begin),
                .low_record_end = share(sizes.low_records, end),
                .low_start_line = sizes.low_record_line(block.low, 0)};
    }

    // `weights`: kept ones, of the block that takes the new token.
    template <int D, int G>
    void attend_heads(const Item& item, int part, int first, float* weights, float* read_weights,
                      Partial partial, uint8_t* scratch) const {
#if defined(MIKV_USE_AMX)
        const TileConfig config(2 * G);
#endif
        const Request& request = *item.request;
        const int head = item.head * layer.queries_per_kv_head() + first;
        const float* sinks = layer.sinks && part == 0 ? layer.sinks + head : nullptr;
        Attention<D, G> attention(layer, high, *reinterpret_cast<AttendState<D, G>*>(scratch));
        attention.start(tensors.q.at(item.token()) + head * D, sinks);
        int64_t before = 0;
        for (const Row* row = request.begin; row < request.end; ++row) {
            const Block block = this->block(*row, item.head, item.draft);
            const Part range = this->range(item, block, before, part);
            before += block.sizes.num_tokens();
            if (range.empty() && !row->is_tail()) continue;
            float read_top[G];
            float* kept = weights + first * stride + range.high_record_begin * kHighRecordTokens;
            attention.run(block.stream, block.low, range, row->is_tail() ? kept : read_weights,
                          stride, row->is_tail() ? partial.high_top + first : read_top);
        }
        attention.finish(
            {partial.out + first * D, partial.top + first, partial.total + first, nullptr});
    }

    template <int D>
    void attend(const Item& item, int part, float* weights, float* read_weights, Partial partial,
                uint8_t* scratch) const {
        const int query_heads = layer.queries_per_kv_head();
        for (int first = 0; first < query_heads;) {
            // Shares of similar size: 5 heads run as 3 + 2, not as 4 + 1.
            const int runs = (query_heads - first + kHeadsAtOnce - 1) / kHeadsAtOnce;
            const int count = (query_heads - first + runs - 1) / runs;
            [&]<int... G>(std::integer_sequence<int, G...>) {
                const auto run = [&]<int Count>() {
                    attend_heads<D, Count>(item, part, first, weights, read_weights, partial,
                                           scratch);
                    return true;
                };
                (void)((count == G + 1 && run.template operator()<G + 1>()) || ...);
            }(std::make_integer_sequence<int, kHeadsAtOnce>());
            first += count;
        }
    }

    void attend(const Item& item, int part, float* weights, float* read_weights, Partial partial,
                uint8_t* scratch) const {
        switch (layer.head_dim) {
            case 64: return attend<64>(item, part, weights, read_weights, partial, scratch);
            case 80: return attend<80>(item, part, weights, read_weights, partial, scratch);
            case 96: return attend<96>(item, part, weights, read_weights, partial, scratch);
            case 128: return attend<128>(item, part, weights, read_weights, partial, scratch);
            default: return attend<256>(item, part, weights, read_weights, partial, scratch);
        }
    }

    // Merges the parts, writes the output and adds the normalized weights to the scores. Those of a
    // draft are stored until it is accepted.
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
            uint16_t* out = tensors.out.at(item.token()) + head * d;
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
        const Row& row = item.request->last();
        if (!row.is_tail()) return;
        const Block block = this->block(row, item.head, item.draft);
        const int64_t before = item.num_tokens() - block.sizes.num_tokens();
        for (int p = 0; p < parts; ++p) {
            const Partial x = partial(partials, p);
            const Part range = this->range(item, block, before, p);
            for (int at = range.high_record_begin; at < range.high_record_end; ++at) {
                int rest;
                float* scores =
                    item.draft
                        ? drafts.at(row.slot, item.head, item.draft - 1) + at * kHighRecordTokens
                        : reinterpret_cast<float*>(block.stream.at(high.score_line(at), &rest));
                F score = item.draft ? splat(0.0f) : mul(load(scores), splat(layer.decay));
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
            const DecodeTensors& tensors, const DraftWeights& drafts) {
    std::vector<Request> requests;
    std::vector<Query> queries;
    requests.reserve(batch.num_rows);
    queries.reserve(batch.num_rows);
    int max_high = 0;
    int64_t max_tokens = 0;
    for (const Row *row = batch.rows, *end = row + batch.num_rows; row < end; ++row) {
        if (row == batch.rows || row[-1].token != row->token) requests.push_back({row, row, 0});
        Request& request = requests.back();
        request.end = row + 1;
        request.num_tokens += Step::sizes_after(*row, 0).num_tokens();
        const int joining = row->is_tail() ? row->queries : 1;
        const int high = row->high_tokens + joining;
        max_high = high > max_high ? high : max_high;
        const int index = static_cast<int>(requests.size()) - 1;
        if (row->is_tail() || row + 1 == end || row[1].token != row->token) {
            for (int draft = 0; draft < joining; ++draft) queries.push_back({index, draft});
        }
        max_tokens = request.num_tokens > max_tokens ? request.num_tokens : max_tokens;
    }
    const int threads = omp_get_max_threads();
    const int tails = static_cast<int>(requests.size()) * layer.num_kv_heads;
    const int items = static_cast<int>(queries.size()) * layer.num_kv_heads;
    // A small number of items is split into parts, so that all threads finish at about the same
    // time.
    int parts = 1;
    if (threads > 1 && items < 4 * threads) {
        parts = (4 * threads + items - 1) / items;
        const int most = 1 + static_cast<int>(max_tokens / kLeastPartTokens);
        parts = parts < most ? parts : most;
    }
    // The new tokens of all queries of a request have to be appended before it attends.
    const bool in_phases = parts > 1 || items > tails;
    const Step step{layer,          cache,
                    batch,          tensors,
                    drafts,         requests.data(),
                    queries.data(), HighLayout(layer.head_dim, layer.high_bits),
                    parts,          high_records(max_high) * kHighRecordTokens};

    const size_t item_bytes = step.weights_bytes() + parts * step.partial_bytes();
    const size_t change_bytes = ChangeScratch::bytes(max_high);
    const size_t thread_bytes = (change_bytes + attend_bytes(layer.head_dim) +
                                 step.read_weights_bytes() + item_bytes + 4095) /
                                4096 * 4096;
    const size_t shared_bytes = in_phases ? items * item_bytes : 0;
    uint8_t* memory = scratch_memory(threads * thread_bytes + shared_bytes);

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Arena arena{memory + static_cast<size_t>(omp_get_thread_num()) * thread_bytes};
        ChangeScratch* change = ChangeScratch::make(arena, max_high);
        uint8_t* scratch = arena.take<uint8_t>(attend_bytes(layer.head_dim));
        float* read_weights = arena.take<float>(kHeadsAtOnce * step.stride);
        uint8_t* own = arena.take<uint8_t>(item_bytes);
        if (!in_phases) {
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < items; ++i) {
                const Item item = step.item(i);
                step.change(*item.request, item.head, *change);
                float* weights = reinterpret_cast<float*>(own);
                uint8_t* partials = own + step.weights_bytes();
                step.attend(item, 0, weights, read_weights, step.partial(partials, 0), scratch);
                step.finish(item, weights, partials);
            }
        } else {
            uint8_t* shared = memory + threads * thread_bytes;
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < tails; ++i) {
                step.change(requests[i / layer.num_kv_heads], i % layer.num_kv_heads, *change);
            }
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < items * parts; ++i) {
                uint8_t* mine = shared + static_cast<size_t>(i / parts) * item_bytes;
                step.attend(step.item(i / parts), i % parts, reinterpret_cast<float*>(mine),
                            read_weights, step.partial(mine + step.weights_bytes(), i % parts),
                            scratch);
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
