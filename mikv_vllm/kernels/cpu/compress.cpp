// Compresses a native request in one layer.
//
// The tiered pages may be the native pages of the request: all keys and values of a KV head are
// read before its first record is written. As many heads as there are threads are compressed at the
// same time, one wave after the other, which limits the scratch memory.
#include <omp.h>

#include "change.hpp"
#include "kernels.hpp"
#include "native.hpp"

namespace mikv::MIKV_ISA {
namespace {

// Intermediate data of one KV head.
struct Head {
    uint16_t *keys, *values;  // [tokens, head_dim]
    double* page_sums;        // [pages, head_dim], of keys
    float* center;            // [head_dim]
    uint8_t* header;          // [kMaxHeader], as in the stream
    uint64_t* sort_keys;      // [tokens]
    uint8_t* chosen;          // [tokens]
    int32_t *high, *low;      // positions, ascending

    static size_t bytes(int tokens, int pages, int head_dim) {
        return static_cast<size_t>(tokens) * (4 * head_dim + 8 + 1 + 4 + 4) +
               static_cast<size_t>(pages) * head_dim * 8 + head_dim * 4 + kMaxHeader + 16 * kLine;
    }
    static Head make(Arena& arena, int tokens, int pages, int d) {
        const size_t n = static_cast<size_t>(tokens);
        return {.keys = arena.take<uint16_t>(n * d),
                .values = arena.take<uint16_t>(n * d),
                .page_sums = arena.take<double>(static_cast<size_t>(pages) * d),
                .center = arena.take<float>(d),
                .header = arena.take<uint8_t>(kMaxHeader),
                .sort_keys = arena.take<uint64_t>(n),
                .chosen = arena.take<uint8_t>(n),
                .high = arena.take<int32_t>(n),
                .low = arena.take<int32_t>(n)};
    }
};

struct Compressor {
    const Layer& layer;
    const Cache& cache;
    const Compression& job;
    NativePages pages;
    HighLayout high;
    LowLayout low;
    HeaderLayout header;

    Sizes sizes() const { return {job.high_tokens, job.low_records, job.low_end_line}; }

    int page_tokens(int page) const {
        const int rest = job.num_tokens - page * layer.block_size;
        return rest < layer.block_size ? rest : layer.block_size;
    }

    // Copies the tokens of one native page, and sums their keys.
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

    // Computes the centres, chooses the high tokens, and writes the header of one head.
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
                    job.recent, h.sort_keys, h.chosen);
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
        __builtin_memset(h.header, 0, kMaxHeader);
        low.keys_per_token() ? frame_per_token(h, head) : frame_per_channel(h, head);
        Stream(cache, layer, head, job.tiered_table).write(0, header_lines(d), h.header);
    }

    // Header for keys with scales per token. The unit of a channel is the square root of its
    // largest key divided by its largest query, in magnitude.
    void frame_per_token(const Head& h, int head) const {
        const int d = layer.head_dim, query_rows = job.num_queries * layer.queries_per_kv_head();
        uint16_t* units = reinterpret_cast<uint16_t*>(h.header + header.units);
        for (int c = 0; c < d; c += 16) {
            F key = splat(0.0f), query = splat(1e-6f);
            for (int64_t t = 0; t < job.num_tokens; ++t) {
                key = vmax(key, vabs(load_half(h.keys + t * d + c, layer.dtype)));
            }
            for (int row = 0; row < query_rows; ++row) {
                query = vmax(query, vabs(load_half(this->query(head, row) + c, layer.dtype)));
            }
            alignas(64) float ratio[16];
            store(ratio, div(key, query));
            for (int i = 0; i < 16; ++i) {
                ratio[i] = __builtin_sqrtf(ratio[i]);
                h.header[header.order + c + i] = static_cast<uint8_t>(c + i);
            }
            store_fp16(units + c, vmin(vmax(load(ratio), splat(1e-3f)), splat(65504.0f)));
        }
    }

    // The last queries of all query heads of a KV head; row r is query head r %
    // queries_per_kv_head.
    const uint16_t* query(int head, int row) const {
        const int query_heads = layer.queries_per_kv_head();
        const int64_t query_head = head * query_heads + row % query_heads;
        return job.queries.at(row / query_heads) + query_head * layer.head_dim;
    }

    // Header for keys with scales per channel: centres, units and order of the channels by rank.
    void frame_per_channel(const Head& h, int head) const {
        const int d = layer.head_dim;
        alignas(64) float far[kMaxHeadDim] = {}, cost[kMaxHeadDim] = {};
        int32_t order[kMaxHeadDim];
        measure(h, head, far, cost);
        order_by_cost(cost, d, order);
        uint16_t* centers = reinterpret_cast<uint16_t*>(h.header);
        uint16_t* units = reinterpret_cast<uint16_t*>(h.header + header.units);
        for (int first = 0; first < d; first += kBandChannels) {
            alignas(64) float center[kBandChannels], ranked_far[kBandChannels];
            for (int i = 0; i < kBandChannels; ++i) {
                center[i] = h.center[order[first + i]];
                ranked_far[i] = far[order[first + i]];
                h.header[header.order + first + i] = static_cast<uint8_t>(order[first + i]);
            }
            // A scale of 255 units covers twice the largest distance of a low key from the centre.
            const int top = (1 << low.band_bits(first / kBandChannels)) - 1;
            const F unit = mul(load(ranked_far), splat(static_cast<float>(2.0 / (255 * top))));
            store_fp16(centers + first, load(center));
            store_fp16(units + first, vmin(vmax(unit, splat(6e-8f)), splat(65504.0f)));
        }
    }

    // For each channel: largest distance of a low key from the centre, and cost of rounding it
    // (key_cost in tiers/key_codecs.py). Without low keys: distances of all keys, and no cost.
    void measure(const Head& h, int head, float* far, float* cost) const {
        const int d = layer.head_dim, num_low = job.low_records * kLowRecordTokens;
        const int count = num_low ? num_low : job.num_tokens;
        alignas(64) double energy[kMaxHeadDim], ranges[16];
        alignas(64) float range[16];
        query_energy(head, energy);
        for (int c = 0; c < d; c += 16) {
            F largest_distance = splat(0.0f);
            for (double& sum : ranges) sum = 0;
            for (int first = 0; first < count; first += kLowRecordTokens) {
                const int end = first + kLowRecordTokens, last = end < count ? end : count;
                F least = splat(0.0f), most = least;
                for (int i = first; i < last; ++i) {
                    const int64_t token = num_low ? h.low[i] : i;
                    const F key = load_half(h.keys + token * d + c, layer.dtype);
                    least = i == first ? key : vmin(least, key);
                    most = i == first ? key : vmax(most, key);
                }
                const F center = load(h.center + c);
                largest_distance =
                    vmax(largest_distance, vmax(vabs(sub(least, center)), vabs(sub(most, center))));
                store(range, sub(most, least));
                for (int i = 0; i < 16; ++i) ranges[i] += double{range[i]} * double{range[i]};
            }
            store(far + c, largest_distance);
            for (int i = 0; i < 16; ++i) {
                cost[c + i] = num_low ? static_cast<float>(energy[c + i] * ranges[i]) : 0.0f;
            }
        }
    }

    // Sum of squares of the queries, for each channel.
    void query_energy(int head, double* energy) const {
        const int d = layer.head_dim, query_rows = job.num_queries * layer.queries_per_kv_head();
        alignas(64) float x[16];
        for (int c = 0; c < d; ++c) energy[c] = 0;
        for (int row = 0; row < query_rows; ++row) {
            const uint16_t* q = query(head, row);
            for (int c = 0; c < d; c += 16) {
                store(x, load_half(q + c, layer.dtype));
                for (int i = 0; i < 16; ++i) energy[c + i] += double{x[i]} * double{x[i]};
            }
        }
    }

    // `buffer` has room for one record, here and below.
    void write_high_record(const Head& h, int head, int record, uint8_t* buffer) const {
        const int d = layer.head_dim, first = record * kHighRecordTokens;
        const int rest = job.high_tokens - first;
        const int count = rest < kHighRecordTokens ? rest : kHighRecordTokens;
        const size_t bytes = static_cast<size_t>(high.num_lines) * kLine;
        if (count < kHighRecordTokens) __builtin_memset(buffer, 0, bytes);
        const HighSlot slots{high};
        for (int i = 0; i < count; ++i) {
            const int64_t token = h.high[first + i];
            slots.write(buffer, i, h.keys + token * d, h.values + token * d,
                        job.scores[head * job.score_stride + token], layer.dtype);
        }
        Stream(cache, layer, head, job.tiered_table)
            .write(high.record_line(record), high.num_lines, buffer);
    }

    void write_low_record(const Head& h, int head, int record, LowRecordScratch& s,
                          uint8_t* buffer) const {
        const int d = layer.head_dim;
        const int32_t* tokens = h.low + record * kLowRecordTokens;
        alignas(64) float lanes[16];
        for (int t = 0; t < kLowRecordTokens; ++t) {
            const int64_t at = static_cast<int64_t>(tokens[t]) * d;
            for (int c = 0; c < d; c += 16) {
                store(s.keys + t * d + c, load_half(h.keys + at + c, layer.dtype));
                store(lanes, load_half(h.values + at + c, layer.dtype));
                for (int i = 0; i < 16; ++i) s.values[(c + i) * kLowRecordTokens + t] = lanes[i];
            }
        }
        __builtin_memset(buffer, 0, static_cast<size_t>(low.num_lines) * kLine);
        quantize_low_record(s, low, KeyFrame(h.header, d), buffer);
        Stream(cache, layer, head, job.tiered_table)
            .write(sizes().low_record_line(low, record), low.num_lines, buffer);
    }
};

}  // namespace

void compress(const Layer& layer, const Cache& cache, const Compression& job) {
    const int d = layer.head_dim, heads = layer.num_kv_heads;
    const int threads = omp_get_max_threads(), wave = threads < heads ? threads : heads;
    const int num_pages = (job.num_tokens + layer.block_size - 1) / layer.block_size;
    const int high_count = high_records(job.high_tokens), records = high_count + job.low_records;
    const Compressor c{layer,
                       cache,
                       job,
                       {layer, cache, job.native_table},
                       HighLayout(d, layer.high_bits),
                       LowLayout(d, job.key_code, job.value_bits),
                       HeaderLayout(d)};
    const size_t head_bytes = (Head::bytes(job.num_tokens, num_pages, d) + 4095) / 4096 * 4096;
    const size_t change_bytes = (ChangeScratch::bytes(0) + 4095) / 4096 * 4096;
    uint8_t* memory = scratch_memory(wave * head_bytes + threads * change_bytes);

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
                if (record < high_count) {
                    c.write_high_record(h, head, record, scratch->target);
                } else {
                    c.write_low_record(h, head, record - high_count, scratch->low, scratch->target);
                }
            }
        }
    }
}

}  // namespace mikv::MIKV_ISA
