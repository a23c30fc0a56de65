// Attention over the high tier. The weights of all its tokens are kept, because they are added to
// the importance scores.
#pragma once

#include "attend_state.hpp"
#include "dots.hpp"
#if defined(MIKV_USE_AMX)
#include "dots_amx.hpp"
#endif

namespace mikv::MIKV_ISA {

template <int D, int G> class HighAttention {
    static constexpr int P = Shape<D>::padded;
    static constexpr int kBlockHighRecords = Shape<D>::block_high_records;
    static constexpr int kRecordsAhead = 4;  // from the prefetch of a record to its use

  public:
    HighAttention(const Layer& layer, const Stream& stream, const HighLayout& high,
                  AttendState<D, G>& state)
        : layer_(layer), stream_(stream), high_(high), s_(state) {}

    // Prefetches the first records.
    [[gnu::always_inline]] void prefetch(const Part& part) const {
        const int count = part.high_record_end - part.high_record_begin;
        stream_.prefetch(high_.record_line(part.high_record_begin),
                         (count < kRecordsAhead ? count : kRecordsAhead) * high_.num_lines);
    }

    // Writes the weights 2**(logit - top) to G rows of `stride` numbers; adds to the sums.
    void run(const Part& part, float* weights, int stride) {
        if (part.high_record_begin == part.high_record_end) return;
        high_.bits == 8 ? keys(part, weights, stride) : full_keys(part, weights, stride);
        exponentials(part, weights, stride);
        high_.bits == 8 ? values(part, weights, stride) : full_values(part, weights, stride);
    }

  private:
    // Tokens in a high record: 16, or fewer in the last one.
    int tokens_of(const Part& part, int record) const {
        const int rest = part.high_tokens - record * kHighRecordTokens;
        return rest < kHighRecordTokens ? rest : kHighRecordTokens;
    }

    const uint8_t* view(int record, uint8_t* buffer) const {
        return stream_.view(high_.record_line(record), high_.num_lines, buffer);
    }

    // Logits from 8-bit keys.
    void keys(const Part& part, float* weights, int stride) {
        constexpr float top = 16383.0f;
        F step[G];
        I offset[G];
        for (int g = 0; g < G; ++g) {
            I total = splat_i(0);
            for (int c = 0; c < P; c += 64) {
                I x[4];
                for (int i = 0; i < 4; ++i) {
                    x[i] = to_int(mul(load(s_.query[g] + c + 16 * i), splat(top)));
                    total = add_i(total, x[i]);
                }
                split_signed(x, s_.queries[0].high[g] + c, s_.queries[0].low[g] + c);
            }
            step[g] = splat(s_.amplitude[g] / top);
            offset[g] = splat_i(sum_i(total) * kHighOffset);
        }
        for (int at = part.high_record_begin; at < part.high_record_end;
             ++at, weights += kHighRecordTokens) {
            if (at + kRecordsAhead < part.high_record_end) {
                stream_.prefetch(high_.record_line(at + kRecordsAhead), high_.num_lines);
            }
            const uint8_t* record = view(at, s_.buffer[0]);
#if defined(MIKV_USE_AMX)
            high_key_tiles(record, s_.queries[0], s_.products[0]);
#else
            key_dots<D, G, 1, false>(record, s_.queries[0], s_.products[0]);
#endif
            const F scale = load_fp16(reinterpret_cast<const uint16_t*>(record + high_.key_scales));
            for (int g = 0; g < G; ++g) {
                const F product = to_float(sub_i(s_.products[0].at(g, 0), offset[g]));
                const F logit = capped(mul(product, mul(scale, step[g])), layer_);
                store(weights + g * stride, first_lanes(logit, tokens_of(part, at), splat(kNever)));
            }
        }
    }

    // Logits from 16-bit keys.
    void full_keys(const Part& part, float* weights, int stride) {
        for (int at = part.high_record_begin; at < part.high_record_end;
             ++at, weights += kHighRecordTokens) {
            const uint8_t* record = view(at, s_.buffer[0]);
            alignas(64) float logits[G][kHighRecordTokens];
            for (auto& row : logits) {
                for (float& logit : row) logit = 0.0f;
            }
            for (int t = 0; t < tokens_of(part, at); ++t) {
                const uint16_t* key = reinterpret_cast<const uint16_t*>(record) + t * D;
                F product[G];
                for (int g = 0; g < G; ++g) product[g] = splat(0.0f);
                for (int c = 0; c < D; c += 16) {
                    const F k = load_half(key + c, layer_.dtype);
                    for (int g = 0; g < G; ++g) {
                        product[g] = fma(k, load(s_.query[g] + c), product[g]);
                    }
                }
                for (int g = 0; g < G; ++g) logits[g][t] = sum(product[g]) * s_.amplitude[g];
            }
            for (int g = 0; g < G; ++g) {
                const F logit = capped(load(logits[g]), layer_);
                store(weights + g * stride, first_lanes(logit, tokens_of(part, at), splat(kNever)));
            }
        }
    }

    // Replaces the logits by weights and adds these to the totals.
    void exponentials(const Part& part, float* weights, int stride) {
        const int count = (part.high_record_end - part.high_record_begin) * kHighRecordTokens;
        F most[G];
        for (int g = 0; g < G; ++g) {
            most[g] = splat(kNever);
            for (int t = 0; t < count; t += 16) {
                most[g] = vmax(most[g], load(weights + g * stride + t));
            }
        }
        s_.raise(most);
        for (int g = 0; g < G; ++g) {
            F total = splat(0.0f);
            for (int t = 0; t < count; t += 16) {
                float* w = weights + g * stride + t;
                const F e = exp2(sub(load(w), splat(s_.top[g])));
                total = add(total, e);
                store(w, e);
            }
            s_.total[g] += sum(total);
        }
    }

    // Sums of weights x 8-bit values.
    void values(const Part& part, const float* weights, int stride) {
        for (int at = part.high_record_begin; at < part.high_record_end; at += kBlockHighRecords) {
            const int rest = part.high_record_end - at;
            const int count = rest < kBlockHighRecords ? rest : kBlockHighRecords;
            F most[1][G];
            for (int g = 0; g < G; ++g) most[0][g] = splat(0.0f);
            for (int i = 0; i < count; ++i, weights += kHighRecordTokens) {
                const uint8_t* record = s_.records[i] = view(at + i, s_.buffer[i]);
                const uint16_t* p = reinterpret_cast<const uint16_t*>(record + high_.value_scales);
                // Free slots have arbitrary bytes, which may be NaN.
                const F scale = first_lanes(load_fp16(p), tokens_of(part, at + i), splat(0.0f));
                for (int g = 0; g < G; ++g) {
                    const F w = mul(load(weights + g * stride), scale);
                    most[0][g] = vmax(most[0][g], w);
                    store(s_.weights[0][g] + i * kHighRecordTokens, w);
                }
            }
            float steps[1][G];
            s_.template split_weights<1>(most, count * kHighRecordTokens, steps);
            s_.sums.clear();
            for (int i = 0; i < count; ++i) {
                const int place = split_place(i * kHighRecordTokens / 4);
                value_dots<D, G, kHighRecordTokens / 4, false>(s_.records[i] + high_.values,
                                                               s_.weight_bytes, place, s_.sums);
            }
            s_.template flush<1>(steps, s_.high_out);
        }
    }

    // Sums of weights x 16-bit values.
    void full_values(const Part& part, const float* weights, int stride) {
        for (int at = part.high_record_begin; at < part.high_record_end;
             ++at, weights += kHighRecordTokens) {
            const uint8_t* record = view(at, s_.buffer[0]);
            for (int t = 0; t < tokens_of(part, at); ++t) {
                const uint16_t* value =
                    reinterpret_cast<const uint16_t*>(record + high_.values) + t * D;
                for (int c = 0; c < D; c += 16) {
                    const F v = load_half(value + c, layer_.dtype);
                    for (int g = 0; g < G; ++g) {
                        float* out = s_.high_out[g] + c;
                        store(out, fma(v, splat(weights[g * stride + t]), load(out)));
                    }
                }
            }
        }
    }

    const Layer& layer_;
    const Stream& stream_;
    const HighLayout& high_;
    AttendState<D, G>& s_;
};

}  // namespace mikv::MIKV_ISA
