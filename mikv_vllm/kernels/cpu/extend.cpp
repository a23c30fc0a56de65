// The next chunk of a prompt whose beginning is compressed already: the tiers are laid out as
// native pages for vLLM's kernel to attend over, and then take the chunk's tokens in.
#include <omp.h>

#include "high_tier.hpp"
#include "kernels.hpp"

namespace mikv::MIKV_ISA {
namespace {

// Writes tokens to one head's native pages.
struct NativeWriter {
    const Layer& layer;
    const Cache& target;
    int head;

    void write(int token, const float* key, const float* value, int value_stride) const {
        const int d = layer.head_dim, slot = token % layer.block_size;
        uint16_t* page = reinterpret_cast<uint16_t*>(
            target.base + token / layer.block_size * target.page_stride + head * target.head_stride);
        alignas(64) float x[256];
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
    const int groups = (tiers.high_tokens + kGroup - 1) / kGroup;
    const int records = groups + tiers.low_chunks;
    const size_t bytes = (ChangeScratch::bytes(0) + 4095) / 4096 * 4096;
    uint8_t* memory = workspace(threads * bytes);

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Arena arena{memory + static_cast<size_t>(omp_get_thread_num()) * bytes};
        ChangeScratch& s = *ChangeScratch::make(arena, 0);
        alignas(64) uint8_t header[kHeader];
#pragma omp for schedule(static)
        for (int i = 0; i < layer.num_kv_heads * records; ++i) {
            const int head = i / records, record = i % records;
            const Stream stream(cache, layer, head, tiers.table);
            const NativeWriter native{layer, target, head};
            if (record < groups) {
                const int first = record * kGroup, rest = tiers.high_tokens - first;
                stream.read(high.group_line(record), high.num_lines, s.source);
                for (int slot = 0; slot < (rest < kGroup ? rest : kGroup); ++slot) {
                    HighSlot{high}.read(s.source, slot, s.chunk.keys, s.chunk.values, 1,
                                        layer.dtype);
                    native.write(first + slot, s.chunk.keys, s.chunk.values, 1);
                }
                continue;
            }
            const int chunk = record - groups, first = tiers.high_tokens + chunk * kChunk;
            stream.read(0, header_lines(d), header);
            stream.read(tiers.low_end - (tiers.low_chunks - chunk) * low.num_lines, low.num_lines,
                        s.source);
            dequantize_chunk(s.chunk, low, KeyFrame(header, d), s.source);
            for (int t = 0; t < kChunk; ++t) {
                native.write(first + t, s.chunk.keys + t * d, s.chunk.values + t, kChunk);
            }
        }
    }
}

void extend(const Layer& layer, const Cache& cache, const Extension& job) {
    const int d = layer.head_dim, threads = omp_get_max_threads();
    const Tiers& tiers = job.tiers;
    const HighLayout high(d, layer.high_bits);
    const LowLayout low(d, tiers.key_code, tiers.value_bits);
    const size_t bytes = (ChangeScratch::bytes(job.most_high) + 4095) / 4096 * 4096;
    uint8_t* memory = workspace(threads * bytes);

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Arena arena{memory + static_cast<size_t>(omp_get_thread_num()) * bytes};
        ChangeScratch& s = *ChangeScratch::make(arena, job.most_high);
#pragma omp for schedule(dynamic, 1)
        for (int head = 0; head < layer.num_kv_heads; ++head) {
            const Stream stream(cache, layer, head, tiers.table);
            const float* scores = job.scores + head * job.score_stride;
            Sizes sizes{tiers.high_tokens, tiers.low_chunks, tiers.low_end};
            for (int first = 0; first < sizes.high_tokens; first += kGroup) {
                int rest;
                float* kept = reinterpret_cast<float*>(
                    stream.at(high.group_line(first / kGroup) + high.num_lines - 1, &rest));
                for (int i = 0; i < kGroup && first + i < sizes.high_tokens; ++i) {
                    kept[i] = job.keep * kept[i] + scores[first + i];
                }
            }
            move_chunks(stream, low, sizes, job.moved_chunks, job.low_end_after, s.source);
            scores += tiers.high_tokens + kChunk * tiers.low_chunks;
            for (int token = 0; token < job.num_tokens; ++token) {
                const int end = high.group_line(sizes.high_tokens / kGroup + 1);
                if (end > sizes.low_end - sizes.low_chunks * low.num_lines) {
                    demote(layer, stream, high, low, sizes, s);
                }
                const int64_t at = static_cast<int64_t>(head) * d;
                append(layer, stream, high, sizes, job.k.at(token) + at, job.v.at(token) + at,
                       scores[token], s.source);
            }
        }
    }
}

}  // namespace mikv::MIKV_ISA
