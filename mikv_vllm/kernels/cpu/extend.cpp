// The next chunk of a prompt whose previous chunks are compressed. `restore` writes the tiers as
// native pages, over which vLLM's kernel computes attention; `extend` then adds the tokens of the
// chunk to the tiers.
#include <omp.h>

#include "change.hpp"
#include "kernels.hpp"

namespace mikv::MIKV_ISA {
namespace {

// Writes tokens to the native pages of one KV head.
struct NativeWriter {
    const Layer& layer;
    const Cache& target;
    int head;

    void write(int token, const float* key, const float* value, int value_stride) const {
        const int d = layer.head_dim, slot = token % layer.block_size;
        const int64_t offset =
            token / layer.block_size * target.page_stride + head * target.head_stride;
        uint16_t* page = reinterpret_cast<uint16_t*>(target.base + offset);
        alignas(64) float x[kMaxHeadDim];
        for (int c = 0; c < d; ++c) x[c] = value[c * value_stride];
        scatter(page, layer.key_index + slot * d, key);
        scatter(page, layer.value_index + slot * d, x);
    }

  private:
    void scatter(uint16_t* page, const int32_t* index, const float* numbers) const {
        alignas(64) uint16_t half[16];
        for (int c = 0; c < layer.head_dim; c += 16) {
            store_half(half, load(numbers + c), layer.dtype);
            for (int i = 0; i < 16; ++i) page[index[c + i]] = half[i];
        }
    }
};

}  // namespace

void restore(const Layer& layer, const Cache& cache, const Tiers& tiers, const Cache& target) {
    const int d = layer.head_dim, threads = omp_get_max_threads();
    const HighLayout high(d, layer.high_bits);
    const LowLayout low(d, tiers.key_code, tiers.value_bits);
    const Sizes sizes{tiers.high_tokens, tiers.low_records, tiers.low_end_line};
    const int high_count = high_records(tiers.high_tokens);
    const int records = high_count + tiers.low_records;
    const size_t bytes = (ChangeScratch::bytes(0) + 4095) / 4096 * 4096;
    uint8_t* memory = scratch_memory(threads * bytes);

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Arena arena{memory + static_cast<size_t>(omp_get_thread_num()) * bytes};
        ChangeScratch& s = *ChangeScratch::make(arena, 0);
        alignas(64) uint8_t header[kMaxHeader];
#pragma omp for schedule(static)
        for (int i = 0; i < layer.num_kv_heads * records; ++i) {
            const int head = i / records, record = i % records;
            const Stream stream(cache, layer, head, tiers.table);
            const NativeWriter native{layer, target, head};
            if (record < high_count) {
                const int first = record * kHighRecordTokens, rest = tiers.high_tokens - first;
                const int count = rest < kHighRecordTokens ? rest : kHighRecordTokens;
                stream.read(high.record_line(record), high.num_lines, s.source);
                for (int slot = 0; slot < count; ++slot) {
                    HighSlot{high}.read(s.source, slot, s.low.keys, s.low.values, 1, layer.dtype);
                    native.write(first + slot, s.low.keys, s.low.values, 1);
                }
                continue;
            }
            const int low_record = record - high_count;
            const int first = tiers.high_tokens + low_record * kLowRecordTokens;
            stream.read(0, header_lines(d), header);
            stream.read(sizes.low_record_line(low, low_record), low.num_lines, s.source);
            dequantize_low_record(s.low, low, KeyFrame(header, d), s.source);
            for (int t = 0; t < kLowRecordTokens; ++t) {
                native.write(first + t, s.low.keys + t * d, s.low.values + t, kLowRecordTokens);
            }
        }
    }
}

namespace {

// One head's part of an extension.
struct Extender {
    const Layer& layer;
    const Extension& job;
    const HighLayout& high;
    const LowLayout& low;
    const Stream& stream;
    int head;

    const uint16_t* row(const Rows& tensor, int token) const {
        return tensor.at(token) + static_cast<int64_t>(head) * layer.head_dim;
    }

    // Chooses the tokens to demote, 32 per record: the least important of high and new tokens.
    void choose(int high_tokens, ChangeScratch& s) const {
        const float* added = job.scores + head * job.score_stride;
        read_scores(stream, high, high_tokens, s.scores);
        for (int i = 0; i < high_tokens; ++i) s.scores[i] = job.keep * s.scores[i] + added[i];
        added += high_tokens + kLowRecordTokens * job.tiers.low_records;
        const int all = high_tokens + job.num_tokens, candidates = all - job.recent;
        for (int i = 0; i < job.num_tokens; ++i) s.scores[high_tokens + i] = added[i];
        __builtin_memset(s.chosen, 0, static_cast<size_t>(all));
        if (job.demoted_records) {
            select_least(s.scores, candidates, kLowRecordTokens * job.demoted_records, s.keys,
                         s.chosen);
        }
    }

    void write_scores(int count, const float* scores) const {
        for (int first = 0; first < count; first += kHighRecordTokens) {
            int rest;
            uint8_t* line = stream.at(high.score_line(first / kHighRecordTokens), &rest);
            const int left = count - first;
            const int here = left < kHighRecordTokens ? left : kHighRecordTokens;
            __builtin_memcpy(line, scores + first, static_cast<size_t>(here) * 4);
        }
    }

    // `victims`: scratch for the keys and values of all high tokens.
    void run(ChangeScratch& s, float* victims) const {
        const int d = layer.head_dim, before = job.tiers.high_tokens;
        Sizes sizes{before, job.tiers.low_records, job.tiers.low_end_line};
        choose(before, s);
        write_scores(before, s.scores);
        int leaving = 0;
        compact(stream, high, sizes, s, [&](const uint8_t* record, int slot) {
            float* to = victims + static_cast<int64_t>(2 * d) * leaving++;
            HighSlot{high}.read(record, slot, to, to + d, 1, layer.dtype);
        });
        alignas(64) uint8_t header[kMaxHeader];
        stream.read(0, header_lines(d), header);
        const KeyFrame frame(header, d);
        int in_record = 0;
        const auto demote_token = [&](const float* key, const float* value) {
            for (int c = 0; c < d; ++c) {
                s.low.keys[in_record * d + c] = key[c];
                s.low.values[c * kLowRecordTokens + in_record] = value[c];
            }
            if (++in_record == kLowRecordTokens) {
                add_low_record(stream, low, frame, sizes, s);
                in_record = 0;
            }
        };
        for (int i = 0; i < leaving; ++i) {
            const float* from = victims + static_cast<int64_t>(2 * d) * i;
            demote_token(from, from + d);
        }
        alignas(64) float key[kMaxHeadDim], value[kMaxHeadDim];
        for (int i = 0; i < job.num_tokens; ++i) {
            const uint16_t *k = row(job.k, i), *v = row(job.v, i);
            if (s.chosen[before + i]) {
                for (int c = 0; c < d; c += 16) store(key + c, load_half(k + c, layer.dtype));
                for (int c = 0; c < d; c += 16) store(value + c, load_half(v + c, layer.dtype));
                demote_token(key, value);
            }
        }
        for (int i = 0; i < job.num_tokens; ++i) {
            if (s.chosen[before + i]) continue;
            append(layer, stream, high, sizes, row(job.k, i), row(job.v, i), s.scores[before + i],
                   s.source);
        }
    }
};

}  // namespace

void extend(const Layer& layer, const Cache& cache, const Extension& job) {
    const int d = layer.head_dim, threads = omp_get_max_threads();
    const HighLayout high(d, layer.high_bits);
    const LowLayout low(d, job.tiers.key_code, job.tiers.value_bits);
    const int most_high = job.tiers.high_tokens + job.num_tokens;
    const size_t victims = static_cast<size_t>(job.tiers.high_tokens + 1) * 2 * d;
    const size_t bytes = (ChangeScratch::bytes(most_high) + victims * 4 + 8191) / 4096 * 4096;
    uint8_t* memory = scratch_memory(threads * bytes);

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Arena arena{memory + static_cast<size_t>(omp_get_thread_num()) * bytes};
        ChangeScratch& s = *ChangeScratch::make(arena, most_high);
        float* buffer = arena.take<float>(victims);
#pragma omp for schedule(dynamic, 1)
        for (int head = 0; head < layer.num_kv_heads; ++head) {
            const Stream stream(cache, layer, head, job.tiers.table);
            Extender{layer, job, high, low, stream, head}.run(s, buffer);
        }
    }
}

}  // namespace mikv::MIKV_ISA
