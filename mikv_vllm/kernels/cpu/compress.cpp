// Moves a whole request of one layer from native pages into its two tiers.
//
// The target pages may be the native ones: a head's keys and values are all read before its first
// record is written. Heads go in waves, as many as there are threads, so that scratch is bounded.
#include <omp.h>

#include "high_tier.hpp"
#include "kernels.hpp"
#include "native.hpp"

namespace mikv::MIKV_ISA {
namespace {

// What is known of one head during its wave.
struct Head {
    uint16_t *keys, *values;   // [tokens, head_dim]
    double* page_sums;         // [pages, head_dim], of keys
    float* center;             // [head_dim]
    uint8_t* header;           // [kHeader]
    uint64_t* sort_keys;       // [tokens]
    uint8_t* chosen;           // [tokens]
    int32_t *high, *low;       // positions, ascending

    static size_t bytes(int tokens, int pages, int head_dim) {
        return static_cast<size_t>(tokens) * (4 * head_dim + 8 + 1 + 4 + 4) +
               static_cast<size_t>(pages) * head_dim * 8 + head_dim * 4 + kHeader +
               16 * kLine;
    }
    static Head make(Arena& arena, int tokens, int pages, int d) {
        const size_t n = static_cast<size_t>(tokens);
        return {arena.take<uint16_t>(n * d), arena.take<uint16_t>(n * d),
                arena.take<double>(static_cast<size_t>(pages) * d), arena.take<float>(d),
                arena.take<uint8_t>(kHeader), arena.take<uint64_t>(n), arena.take<uint8_t>(n),
                arena.take<int32_t>(n), arena.take<int32_t>(n)};
    }
};

struct Compressor {
    const Layer& layer;
    const Cache& cache;
    const Compression& job;
    NativePages pages;
    HighLayout high;
    LowLayout low;

    int page_tokens(int page) const {
        const int rest = job.num_tokens - page * layer.block_size;
        return rest < layer.block_size ? rest : layer.block_size;
    }

    void gather(const Head& h, int head, int page) const {
        const int d = layer.head_dim, tokens = page_tokens(page);
        const int64_t at = static_cast<int64_t>(page) * layer.block_size * d;
        pages.rows(page, head, tokens, layer.key_index, layer.key_runs, h.keys + at);
        pages.rows(page, head, tokens, layer.value_index, layer.value_runs, h.values + at);
        for (int c = 0; c < d; c += 16) {
            F total = splat(0.0f);
            for (int t = 0; t < tokens; ++t) {
                total = add(total, load_half(h.keys + at + t * d + c, layer.dtype));
            }
            alignas(64) float lanes[16];
            store(lanes, total);
            for (int i = 0; i < 16; ++i) h.page_sums[page * d + c + i] = lanes[i];
        }
    }

    // Centre, choice, ranks, units and header of one head.
    void choose(const Head& h, int head, int num_pages) const {
        const int d = layer.head_dim;
        for (int c = 0; c < d; ++c) {
            double total = 0;
            for (int page = 0; page < num_pages; ++page) total += h.page_sums[page * d + c];
            const float mean = static_cast<float>(total / job.num_tokens);
            h.center[c] = mean < -65504.0f ? -65504.0f : mean > 65504.0f ? 65504.0f : mean;
        }
        alignas(64) uint16_t half[16];
        for (int c = 0; c < d; c += 16) {
            store_fp16(half, load(h.center + c));
            store(h.center + c, load_fp16(half));
        }
        select_high(job.scores + head * job.score_stride, job.num_tokens, job.high_tokens,
                    layer.recent, h.sort_keys, h.chosen);
        int32_t *to_high = h.high, *to_low = h.low;
        for (int t = 0; t < job.num_tokens; ++t) {
            if (h.chosen[t]) {
                *to_high++ = t;
            } else {
                *to_low++ = t;
            }
        }
        write_header(h, head);
    }

    void write_header(const Head& h, int head) const {
        const int d = layer.head_dim;
        __builtin_memset(h.header, 0, kHeader);
        low.keys_per_token() ? balance(h, head) : rank(h, head);
        Stream(cache, layer, head, job.tiered_table).write(0, header_lines(d), h.header);
    }

    // Header of balanced keys: the root of each channel's largest key by its largest query.
    void balance(const Head& h, int head) const {
        const int d = layer.head_dim, shared = layer.queries_per_kv_head();
        uint16_t* unit = reinterpret_cast<uint16_t*>(h.header) + d;
        for (int c = 0; c < d; c += 16) {
            F key = splat(0.0f), query = splat(1e-6f);
            for (int64_t t = 0; t < job.num_tokens; ++t) {
                key = vmax(key, vabs(load_half(h.keys + t * d + c, layer.dtype)));
            }
            for (int row = 0; row < job.num_queries * shared; ++row) {
                query = vmax(query, vabs(load_half(this->query(head, row) + c, layer.dtype)));
            }
            alignas(64) float ratio[16];
            store(ratio, div(key, query));
            for (int i = 0; i < 16; ++i) {
                ratio[i] = __builtin_sqrtf(ratio[i]);
                h.header[4 * d + c + i] = static_cast<uint8_t>(c + i);
            }
            store_fp16(unit + c, vmin(vmax(load(ratio), splat(1e-3f)), splat(65504.0f)));
        }
    }

    // Row `row` of the last queries of all heads that share a KV head.
    const uint16_t* query(int head, int row) const {
        const int shared = layer.queries_per_kv_head();
        return job.queries.at(row / shared) +
               (head * shared + row % shared) * static_cast<int64_t>(layer.head_dim);
    }

    void rank(const Head& h, int head) const {
        const int d = layer.head_dim;
        alignas(64) float far[256] = {}, cost[256] = {};
        int32_t order[256];
        measure(h, head, far, cost);
        order_by_cost(cost, d, order);
        uint16_t* half = reinterpret_cast<uint16_t*>(h.header);
        for (int first = 0; first < d; first += kBand) {
            alignas(64) float center[kBand], ranked_far[kBand];
            for (int i = 0; i < kBand; ++i) {
                center[i] = h.center[order[first + i]];
                ranked_far[i] = far[order[first + i]];
                h.header[4 * d + first + i] = static_cast<uint8_t>(order[first + i]);
            }
            // A scale of 255 units covers twice the farthest low key from the centre.
            const int top = (1 << low.band_bits(first / kBand)) - 1;
            const F unit = mul(load(ranked_far), splat(static_cast<float>(2.0 / (255 * top))));
            store_fp16(half + first, load(center));
            store_fp16(half + d + first, vmin(vmax(unit, splat(6e-8f)), splat(65504.0f)));
        }
    }

    // How far low keys lie from the centre, and what rounding a channel costs: see key_cost in
    // tiers/codec.py. Without low keys, all keys and no cost.
    void measure(const Head& h, int head, float* far, float* cost) const {
        const int d = layer.head_dim, num_low = job.low_records * kLowRecordTokens;
        const int count = num_low ? num_low : job.num_tokens;
        alignas(64) double energy[256], ranges[16];
        alignas(64) float range[16];
        query_energy(head, energy);
        for (int c = 0; c < d; c += 16) {
            F largest_distance = splat(0.0f);
            for (double& sum : ranges) sum = 0;
            for (int first = 0; first < count; first += kLowRecordTokens) {
                const int last = first + kLowRecordTokens < count ? first + kLowRecordTokens : count;
                F least = splat(0.0f), most = least;
                for (int i = first; i < last; ++i) {
                    const int64_t token = num_low ? h.low[i] : i;
                    const F key = load_half(h.keys + token * d + c, layer.dtype);
                    least = i == first ? key : vmin(least, key);
                    most = i == first ? key : vmax(most, key);
                }
                const F center = load(h.center + c);
                largest_distance = vmax(
                    largest_distance, vmax(vabs(sub(least, center)), vabs(sub(most, center))));
                store(range, sub(most, least));
                for (int i = 0; i < 16; ++i) ranges[i] += double{range[i]} * double{range[i]};
            }
            store(far + c, largest_distance);
            for (int i = 0; i < 16; ++i) {
                cost[c + i] = num_low ? static_cast<float>(energy[c + i] * ranges[i]) : 0.0f;
            }
        }
    }

    // Sum of the squares of each channel's queries.
    void query_energy(int head, double* energy) const {
        const int d = layer.head_dim, shared = layer.queries_per_kv_head();
        alignas(64) float x[16];
        for (int c = 0; c < d; ++c) energy[c] = 0;
        for (int row = 0; row < job.num_queries * shared; ++row) {
            const uint16_t* q = query(head, row);
            for (int c = 0; c < d; c += 16) {
                store(x, load_half(q + c, layer.dtype));
                for (int i = 0; i < 16; ++i) energy[c + i] += double{x[i]} * double{x[i]};
            }
        }
    }

    void write_high_record(const Head& h, int head, int group, uint8_t* record) const {
        const int d = layer.head_dim, first = group * kHighRecordTokens;
        const int rest = job.high_tokens - first, count = rest < kHighRecordTokens ? rest : kHighRecordTokens;
        const size_t bytes = static_cast<size_t>(high.num_lines) * kLine;
        if (count < kHighRecordTokens) __builtin_memset(record, 0, bytes);
        const HighSlot slots{high};
        for (int i = 0; i < count; ++i) {
            const int64_t token = h.high[first + i];
            slots.write(record, i, h.keys + token * d, h.values + token * d,
                        job.scores[head * job.score_stride + token], layer.dtype);
        }
        Stream(cache, layer, head, job.tiered_table)
            .write(high.high_record_line(group), high.num_lines, record);
    }

    void write_low_record(const Head& h, int head, int chunk, LowRecordScratch& s, uint8_t* record) const {
        const int d = layer.head_dim;
        const int32_t* tokens = h.low + chunk * kLowRecordTokens;
        alignas(64) float lanes[16];
        for (int t = 0; t < kLowRecordTokens; ++t) {
            const int64_t at = static_cast<int64_t>(tokens[t]) * d;
            for (int c = 0; c < d; c += 16) {
                store(s.keys + t * d + c, load_half(h.keys + at + c, layer.dtype));
                store(lanes, load_half(h.values + at + c, layer.dtype));
                for (int i = 0; i < 16; ++i) s.values[(c + i) * kLowRecordTokens + t] = lanes[i];
            }
        }
        __builtin_memset(record, 0, static_cast<size_t>(low.num_lines) * kLine);
        quantize_low_record(s, low, KeyFrame(h.header, d), record);
        Stream(cache, layer, head, job.tiered_table)
            .write(job.low_end_line - (job.low_records - chunk) * low.num_lines, low.num_lines, record);
    }
};

}  // namespace

void compress(const Layer& layer, const Cache& cache, const Compression& job) {
    const int d = layer.head_dim, heads = layer.num_kv_heads;
    const int threads = omp_get_max_threads(), wave = threads < heads ? threads : heads;
    const int num_pages = (job.num_tokens + layer.block_size - 1) / layer.block_size;
    const int groups = (job.high_tokens + kHighRecordTokens - 1) / kHighRecordTokens, records = groups + job.low_records;
    const Compressor c{layer,
                       cache,
                       job,
                       {layer, cache, job.native_table},
                       HighLayout(d, layer.high_bits),
                       LowLayout(d, job.key_code, job.value_bits)};
    const size_t head_bytes = (Head::bytes(job.num_tokens, num_pages, d) + 4095) / 4096 * 4096;
    const size_t change_bytes = (ChangeScratch::bytes(0) + 4095) / 4096 * 4096;
    uint8_t* memory = workspace(wave * head_bytes + threads * change_bytes);

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Arena arena{memory + wave * head_bytes +
                    static_cast<size_t>(omp_get_thread_num()) * change_bytes};
        ChangeScratch* scratch = ChangeScratch::make(arena, 0);
        const auto head_of = [&](int index) {
            Arena own{memory + static_cast<size_t>(index) * head_bytes};
            return Head::make(own, job.num_tokens, num_pages, d);
        };
        for (int first = 0; first < heads; first += wave) {
            const int count = heads - first < wave ? heads - first : wave;
#pragma omp for schedule(static)
            for (int i = 0; i < count * num_pages; ++i) {
                c.gather(head_of(i / num_pages), first + i / num_pages, i % num_pages);
            }
#pragma omp for schedule(static)
            for (int i = 0; i < count; ++i) c.choose(head_of(i), first + i, num_pages);
#pragma omp for schedule(dynamic, 8)
            for (int i = 0; i < count * records; ++i) {
                const Head h = head_of(i / records);
                const int record = i % records, head = first + i / records;
                if (record < groups) {
                    c.write_high_record(h, head, record, scratch->target);
                } else {
                    c.write_low_record(h, head, record - groups, scratch->chunk, scratch->target);
                }
            }
        }
    }
}

}  // namespace mikv::MIKV_ISA
