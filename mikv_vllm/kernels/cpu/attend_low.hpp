// Attention over the low tier, in blocks of records: keys of all records in a block, one pass of
// exponentials, then values of all records, so that sums are integers within a block.
#pragma once

#include "attend_state.hpp"
#include "codec.hpp"
#include "dots.hpp"
#if defined(MIKV_USE_AMX)
#include "dots_amx.hpp"
#endif

namespace mikv::MIKV_ISA {

template <int D, int G> class LowAttention {
    using S = AttendState<D, G>;
    static constexpr int P = S::P, V = S::V, kBlock = S::kBlock;
    static constexpr int kBlockLowRecords = Shape<D>::block_low_records;

  public:
    LowAttention(const Layer& layer, const Stream& stream, const LowLayout& low, S& state)
        : layer_(layer),
          stream_(stream),
          low_(low),
          keys_per_token_(low.keys_per_token()),
          s_(state) {}

    // Prefetches the first block.
    [[gnu::always_inline]] void prefetch(const Part& part) const {
        const int count = part.low_record_end - part.low_record_begin;
        stream_.prefetch(part.low_start_line + part.low_record_begin * low_.num_lines,
                         (count < kBlockLowRecords ? count : kBlockLowRecords) * low_.num_lines);
    }

    // Adds to the sums.
    void run(const Part& part) {
        for (int at = part.low_record_begin; at < part.low_record_end; at += kBlockLowRecords) {
            const int rest = part.low_record_end - at;
            block(part.low_start_line + at * low_.num_lines,
                  rest < kBlockLowRecords ? rest : kBlockLowRecords, rest - kBlockLowRecords);
        }
    }

  private:
    // One block: `count` records from `line` on, which `after` more records follow.
    void block(int line, int count, int after) {
        float steps[kBlockLowRecords], zeros[kBlockLowRecords][G];
        for (int i = 0; i < count; ++i) {
            const int at = line + i * low_.num_lines;
            if (i < after) stream_.prefetch(at + kBlockLowRecords * low_.num_lines, low_.num_lines);
            s_.records[i] = stream_.view(at, low_.num_lines, s_.buffer[2 * i]);
            steps[i] = fold_scales(s_.records[i], s_.queries[i], zeros[i]);
            unpack_keys(s_.records[i], low_, s_.tiles + i * kLowRecordTokens * D);
        }
        for (int i = 0; i < count; ++i) {
            const uint8_t* tiles = s_.tiles + i * kLowRecordTokens * D;
#if defined(MIKV_USE_AMX)
            const uint8_t* zeros = keys_per_token_ ? s_.ones : s_.records[i] + low_.key_zeros;
            low_key_tiles<D, G>(tiles, zeros, s_.queries[i], s_.products[i]);
#else
            key_dots<D, G, 2, true>(tiles, s_.queries[i], s_.products[i]);
#endif
        }
        logits(count, steps, zeros);
        float weight_steps[V][G];
        weights(count, weight_steps);
        for (int i = 0; i < count; ++i) {
            unpack(s_.records[i] + low_.values, low_.value_bits, kLowRecordTokens * D / kLine,
                   s_.tiles + i * kLowRecordTokens * D);
        }
#if defined(MIKV_USE_AMX)
        low_value_tiles<D, G>(s_.tiles, s_.value_zeros, count * kLowRecordTokens, s_.weight_bytes,
                              s_.sums);
        for (int v = 0; v < V; ++v) {
            for (int g = 0; g < G; ++g) {
                const float zero = 256.0f * static_cast<float>(s_.sums.zero_high[v][g]) +
                                   static_cast<float>(s_.sums.zero_low[v][g]);
                s_.zeros[v][g] = add(s_.zeros[v][g],
                                     first_lanes(splat(zero * weight_steps[v][g]), 1, splat(0.0f)));
            }
        }
#else
        s_.sums.clear();
        for (int i = 0; i < count; ++i) {
            const int place = split_place(i * kLowRecordTokens / 4);
            value_dots<D, G, kLowRecordTokens / 4, true>(s_.tiles + i * kLowRecordTokens * D,
                                                         s_.weight_bytes, place, s_.sums);
        }
#endif
        s_.template flush<V>(weight_steps, s_.low_out);
    }

    // Multiplies the queries with the channel scales of a record and rounds them to 15 bits.
    // Returns the unit of the rounded queries: one for all heads, so that one reduction over the
    // channels is enough. Without AMX, also computes their products with the zero points, `zeros`.
    float fold_scales(const uint8_t* record, QueryBytes<D, G>& queries, float (&zeros)[G]) {
        constexpr int vectors = D / 16;
        F scales[vectors], most = splat(0.0f);
        for (int i = 0; i < vectors; ++i) {
            scales[i] = load(s_.unit + 16 * i);
            if (!keys_per_token_) {
                scales[i] = mul(scales[i], to_float(load_u8(record + low_.key_scales + 16 * i)));
            }
            most = vmax(most, mul(load(s_.magnitude + 16 * i), scales[i]));
        }
        const float amplitude = largest(most);
        const F inverse = splat(amplitude > 0.0f ? 16383.0f / amplitude : 0.0f);
        F zero_points[kAmx ? 1 : vectors];
        for (int i = 0; i < vectors; ++i) {
            scales[i] = mul(scales[i], inverse);
            if constexpr (!kAmx) {
                zero_points[i] = keys_per_token_
                                     ? splat(1.0f)
                                     : to_float(load_s8(record + low_.key_zeros + 16 * i));
            }
        }
        for (int g = 0; g < G; ++g) {
            F zero = splat(0.0f);
            for (int c = 0; c < P; c += 64) {
                I x[4];
                for (int i = 0; i < 4; ++i) {
                    const int at = c / 16 + i;
                    if (at >= vectors) {
                        x[i] = splat_i(0);
                        continue;
                    }
                    const F folded = mul(load(s_.ranked[g] + 16 * at), scales[at]);
                    x[i] = to_int(folded);
                    // The rounded query is used here as well: integers and zero points have
                    // opposite signs, so most of its rounding error cancels.
                    if constexpr (!kAmx) zero = fma(to_float(x[i]), zero_points[at], zero);
                }
                split_signed(x, queries.high[g] + c, queries.low[g] + c);
            }
            if constexpr (!kAmx) zeros[g] = sum(zero);
        }
        return amplitude / 16383.0f;
    }

    // Computes the logits of a block from its products, and raises the tops to them.
    void logits(int count, const float (&steps)[kBlockLowRecords],
                const float (&zeros)[kBlockLowRecords][G]) {
        F most[G];
        for (int g = 0; g < G; ++g) most[g] = splat(kNever);
        for (int i = 0; i < count; ++i) {
            const KeyProducts<G>& products = s_.products[i];
            for (int g = 0; g < G; ++g) {
                const float step = steps[i] * s_.amplitude[g];
                const float zero =
                    kAmx ? static_cast<float>(products.zero_high[g] * 128 + products.zero_low[g])
                         : zeros[i][g];
                const F constant = splat(s_.center[g] + zero * (step / kKeyZeroSteps));
                for (int half = 0; half < 2; ++half) {
                    const F product = to_float(products.at(g, half));
                    const F logit =
                        capped(keys_per_token_ ? per_token_logit(i, half, product, zero, step)
                                               : fma(product, splat(step), constant),
                               layer_);
                    most[g] = vmax(most[g], logit);
                    store(s_.logits[g] + i * kLowRecordTokens + 16 * half, logit);
                }
            }
        }
        s_.raise(most);
    }

    // Logits of 16 keys with one scale per token. `sum`: of the integers of the query.
    F per_token_logit(int record, int half, F product, float sum, float step) const {
        const uint8_t* at = s_.records[record] + 16 * half;
        const F scale = decode_scale(load_u8(at + low_.key_scales));
        const F zero = to_float(load_s8(at + low_.key_zeros));
        return mul(fma(zero, splat(sum), product), mul(scale, splat(step)));
    }

    // Computes the weights of a block, times value scales, from its logits. Adds to the totals and
    // to the sums with zero points.
    void weights(int count, float (&steps)[V][G]) {
        F most[V][G], total[G];
        for (int g = 0; g < G; ++g) {
            total[g] = splat(0.0f);
            for (int v = 0; v < V; ++v) most[v][g] = splat(0.0f);
        }
        for (int i = 0; i < 2 * count; ++i) {
            const uint8_t* record = s_.records[i / 2] + i % 2 * 16;
            F e[G];
            for (int g = 0; g < G; ++g) {
                e[g] = exp2(sub(load(s_.logits[g] + 16 * i), splat(s_.top[g])));
                total[g] = add(total[g], e[g]);
            }
            for (int v = 0; v < V; ++v) {
                const int first = v * kLowRecordTokens;
                const F scale = decode_scale(load_u8(record + low_.value_scales + first));
                const uint8_t* zeros = record + low_.value_zeros + first;
                const F zero = kAmx ? splat(0.0f) : to_float(load_s8(zeros));
                if constexpr (kAmx) {
                    __builtin_memcpy(s_.value_zeros + v * kBlock + 16 * i, zeros, 16);
                }
                for (int g = 0; g < G; ++g) {
                    const F w = mul(e[g], scale);
                    if constexpr (!kAmx) s_.zeros[v][g] = fma(w, zero, s_.zeros[v][g]);
                    most[v][g] = vmax(most[v][g], w);
                    store(s_.weights[v][g] + 16 * i, w);
                }
            }
        }
        for (int g = 0; g < G; ++g) s_.total[g] += sum(total[g]);
        s_.template split_weights<V>(most, count * kLowRecordTokens, steps);
    }

    const Layer& layer_;
    const Stream& stream_;
    const LowLayout& low_;
    const bool keys_per_token_;
    S& s_;
};

}  // namespace mikv::MIKV_ISA
