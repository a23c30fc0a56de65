// State of the attention over parts of blocks: queries, running softmax, operands and sums.
#pragma once

#include "dot_operands.hpp"
#include "logits.hpp"
#include "stream.hpp"

namespace mikv::MIKV_ISA {

// A part of one block.
struct Part {
    int high_record_begin, high_record_end, high_tokens;   // high_tokens: of the whole block
    int low_record_begin, low_record_end, low_start_line;  // low_start_line: of low record 0

    bool empty() const {
        return high_record_begin == high_record_end && low_record_begin == low_record_end;
    }
};

// State for G query heads of head size D that share a KV head. Logits and tops count in powers of
// two, so that exponentials need no factor.
template <int D, int G> struct AttendState {
    static constexpr int P = Shape<D>::padded, V = Shape<D>::value_groups;
    static constexpr int kBlock = Shape<D>::block;

    // Queries, scaled and divided by `amplitude`, their largest magnitude; zero for channels >= D.
    alignas(64) float query[G][P];
    alignas(64) float ranked[G][P];  // the same, with channels by rank
    alignas(64) float unit[D];       // of the key channels, by rank
    alignas(64) float magnitude[P];  // largest magnitude of all heads' queries, by rank

    // Operands and products of one block.
    QueryBytes<D, G> queries[Shape<D>::block_low_records];
    KeyProducts<G> products[Shape<D>::block_low_records];
    alignas(64) uint8_t tiles[Shape<D>::tiles_bytes];
    alignas(64) float logits[G][kBlock];
    alignas(64) float weights[V][G][kBlock];
    WeightBytes<D, G> weight_bytes;
    alignas(64) uint8_t value_zeros[V * kBlock];
    alignas(64) uint8_t ones[P];  // every byte is 1: products with it are sums of the query
    ValueSums<D, G> sums;

    // Running softmax and its sums.
    alignas(64) float high_out[G][D], low_out[G][D];
    F zeros[V][G];       // sums of weights x zero points of values, by lane
    float amplitude[G];  // of the queries
    float center[G];     // products of the queries with the centres of the key channels
    float top[G], total[G];

    const uint8_t* records[Shape<D>::block_high_records];
    // Copies of the records that cross a page boundary.
    static constexpr int kRecord = kHighRecordTokens * D * 4 + 3 * kLine;
    alignas(64) uint8_t buffer[Shape<D>::block_high_records][kRecord];

    // Loads the queries of G heads and starts the softmax, with the logits `sinks` if not null.
    void start(const Layer& layer, const uint16_t* q, const float* sinks) {
        __builtin_memset(ones, 1, P);
        // With a soft cap, the factor kLog2E is applied after the cap.
        const F scale = splat(layer.softcap == 0.0f ? layer.scale * kLog2E : layer.scale);
        for (int g = 0; g < G; ++g) {
            F most = splat(0.0f);
            for (int c = 0; c < D; c += 16) {
                const F x = mul(load_half(q + g * D + c, layer.dtype), scale);
                most = vmax(most, vabs(x));
                store(query[g] + c, x);
            }
            const float largest_query = largest(most);
            amplitude[g] = largest_query > 0.0f ? largest_query : 1.0f;
            const F inverse = splat(1.0f / amplitude[g]);
            for (int c = 0; c < P; c += 16) {
                store(query[g] + c, c < D ? mul(load(query[g] + c), inverse) : splat(0.0f));
            }
            top[g] = sinks ? sinks[g] * kLog2E : kNever;
            total[g] = sinks ? 1.0f : 0.0f;
        }
        __builtin_memset(high_out, 0, sizeof high_out);
        __builtin_memset(low_out, 0, sizeof low_out);
        for (auto& row : zeros) {
            for (F& zero : row) zero = splat(0.0f);
        }
    }

    // Reads the header of a block: puts the queries into the order of its key channels.
    void enter(const Stream& stream) {
        alignas(64) uint8_t header[header_lines(D) * kLine];
        const KeyFrame frame(stream.view(0, header_lines(D), header), D);
        for (int c = 0; c < D; c += 16) store(unit + c, load_fp16(frame.unit + c));
        for (int c = 0; c < P; c += 16) store(magnitude + c, splat(0.0f));
        for (int g = 0; g < G; ++g) {
            F product = splat(0.0f);
            for (int r = 0; r < D; ++r) ranked[g][r] = query[g][frame.order[r]];
            for (int c = D; c < P; ++c) ranked[g][c] = 0.0f;
            for (int c = 0; c < D; c += 16) {
                const F x = load(ranked[g] + c);
                product = fma(x, load_fp16(frame.center + c), product);
                store(magnitude + c, vmax(load(magnitude + c), vabs(x)));
            }
            center[g] = sum(product) * amplitude[g];
        }
    }

    // Raises the tops to the largest of the logits `most`, and rescales all sums.
    void raise(const F (&most)[G]) {
        for (int g = 0; g < G; ++g) {
            const float new_top = largest(most[g]);
            if (new_top <= top[g]) continue;
            const float factor = largest(exp2(splat(top[g] - new_top)));
            top[g] = new_top;
            total[g] *= factor;
            for (int v = 0; v < V; ++v) zeros[v][g] = mul(zeros[v][g], splat(factor));
            for (int c = 0; c < D; c += 16) {
                store(high_out[g] + c, mul(load(high_out[g] + c), splat(factor)));
                store(low_out[g] + c, mul(load(low_out[g] + c), splat(factor)));
            }
        }
    }

    // Rounds `weights` of `tokens` tokens to 16-bit integers, `weight_bytes`, in units of
    // steps[v][g]. `most`: the largest weights, by lane.
    template <int Slices>
    void split_weights(const F (&most)[Slices][G], int tokens, float (&steps)[Slices][G]) {
        for (int v = 0; v < Slices; ++v) {
            for (int g = 0; g < G; ++g) {
                const float largest_weight = largest(most[v][g]);
                const F inverse = splat(largest_weight > 0.0f ? 65535.0f / largest_weight : 0.0f);
                steps[v][g] = largest_weight / 65535.0f;
                for (int t = tokens; t % 64; t += 16) {
                    store(weights[v][g] + t, splat(0.0f));
                }
                for (int t = 0; t < tokens; t += 64) {
                    I x[4];
                    for (int i = 0; i < 4; ++i) {
                        x[i] = to_int(mul(load(weights[v][g] + t + 16 * i), inverse));
                    }
                    split_unsigned(x, weight_bytes.of[v].high[g] + t,
                                   weight_bytes.of[v].low[g] + t);
                }
            }
        }
    }

    // Adds `sums`, in units of `steps`, to `out`.
    template <int Slices> void flush(const float (&steps)[Slices][G], float (&out)[G][D]) {
        for (int g = 0; g < G; ++g) {
            for (int c = 0; c < D; c += 16) {
                const F step = splat(steps[c * Slices / D][g]);
                const F high = to_float(load_i(sums.high[g] + c));
                const F low = to_float(load_i(sums.low[g] + c));
                store(out[g] + c, fma(fma(high, splat(256.0f), low), step, load(out[g] + c)));
            }
        }
    }
};

// The logit with the soft cap of the layer, if it has one.
inline F capped(F logit, const Layer& layer) {
    return layer.softcap == 0.0f ? logit : soft_cap(logit, layer.softcap, kLog2E);
}

}  // namespace mikv::MIKV_ISA
