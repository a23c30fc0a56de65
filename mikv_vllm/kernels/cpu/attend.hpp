// Attention of a few query heads that share a KV head over a part of a request's two tiers.
//
// The high tier comes first: its weights are kept, because they become importance scores. The low
// tier follows in blocks with an online softmax: within a block, keys of all chunks first, then one
// pass of exponentials, then values of all chunks, so that sums stay integer for a whole block.
#pragma once

#include "codec.hpp"
#include "dots.hpp"

namespace mikv::MIKV_ISA {

constexpr float kNever = -1e30f;  // a logit that no token has
constexpr float kLog2E = 1.44269504f;

// A range of a request's tiers.
struct Part {
    int high_record_begin, high_record_end, high_tokens;  // high_tokens: of the whole request
    int low_record_begin, low_record_end, low_start;    // low_start: line of chunk 0
};

// A softmax over a part, unfinished: outputs are sums of 2**(logit - top) * value. Logits count in
// powers of two, so that the exponentials need no factor.
struct Partial {
    float *out;   // [heads, head_dim]
    float *top, *total, *high_top;  // [heads]; kept high weights count from high_top
};

template <int D, int G> struct AttendScratch {
    static constexpr int P = Shape<D>::padded, V = Shape<D>::value_groups;
    static constexpr int kBlock = Shape<D>::block;
    alignas(64) float query[G][P];    // scaled and divided by `amplitude`, zero from D on
    alignas(64) float ranked[G][P];   // the same by the key channels' rank
    alignas(64) float unit[D];        // of the key scales, as all that follows by rank
    alignas(64) float magnitude[P];   // the largest of all heads' queries, without signs
    QueryBytes<D, G> queries[Shape<D>::block_low_records];
    KeyProducts<G> products[Shape<D>::block_low_records];
    alignas(64) uint8_t tiles[Shape<D>::tiles_bytes];
    alignas(64) float logits[G][kBlock];
    alignas(64) float weights[V][G][kBlock];
    WeightBytes<D, G> weight_bytes;
    alignas(64) uint8_t value_zeros[V * kBlock];
    alignas(64) uint8_t ones[P];      // bytes of 1: zero points whose products are sums
    ValueSums<D, G> sums;
    alignas(64) float high_out[G][D], low_out[G][D];
    F zeros[V][G];  // sums of weights x value zeros, by lane
    float amplitude[G], center[G], top[G], total[G];
    const uint8_t* records[Shape<D>::block_high_records];
    alignas(64) uint8_t buffer[Shape<D>::block_high_records][(kHighRecordTokens * D * 4 + 3 * kLine)];
};

template <int D, int G> class Attention {
    using S = AttendScratch<D, G>;
    static constexpr int P = S::P, V = S::V, kBlock = S::kBlock;
    static constexpr int kBlockLowRecords = Shape<D>::block_low_records;
    static constexpr int kBlockHighRecords = Shape<D>::block_high_records;
    static constexpr int kHighRecordsAhead = 4;

  public:
    Attention(const Layer& layer, const Stream& stream, const HighLayout& high,
              const LowLayout& low, S& scratch)
        : layer_(layer),
          stream_(stream),
          high_(high),
          low_(low),
          keys_per_token_(low.keys_per_token()),
          s_(scratch) {}

    // `weights`: 2**(logit - high_top) of the part's high tokens, [G] rows of `stride`.
    void run(const uint16_t* query, const float* sinks, const Part& part, float* weights,
             int stride, Partial partial) {
#if defined(MIKV_USE_AMX)
        const TileConfig config(2 * G);
#endif
        // What comes first; the loops ask for what comes next. Pages are too short, and change too
        // often, for the processor to find the pattern in time.
        stream_.prefetch(0, header_lines(D));
        const int groups = part.high_record_end - part.high_record_begin;
        stream_.prefetch(high_.high_record_line(part.high_record_begin),
                         (groups < kHighRecordsAhead ? groups : kHighRecordsAhead) * high_.num_lines);
        prepare(query);
        for (int g = 0; g < G; ++g) {
            s_.top[g] = sinks ? sinks[g] * kLog2E : kNever;
            s_.total[g] = sinks ? 1.0f : 0.0f;
        }
        __builtin_memset(s_.high_out, 0, sizeof s_.high_out);
        __builtin_memset(s_.low_out, 0, sizeof s_.low_out);
        for (auto& row : s_.zeros) {
            for (F& zero : row) zero = splat(0.0f);
        }
        const int chunks = part.low_record_end - part.low_record_begin;
        stream_.prefetch(part.low_start + part.low_record_begin * low_.num_lines,
                         (chunks < kBlockLowRecords ? chunks : kBlockLowRecords) * low_.num_lines);
        if (part.high_record_begin < part.high_record_end) {
            high_.bits == 8 ? high_keys(part, weights, stride) : full_keys(part, weights, stride);
            high_weights(part, weights, stride);
            high_.bits == 8 ? high_values(part, weights, stride) : full_values(part, weights, stride);
        }
        for (int g = 0; g < G; ++g) partial.high_top[g] = s_.top[g];
        for (int chunk = part.low_record_begin; chunk < part.low_record_end; chunk += kBlockLowRecords) {
            const int rest = part.low_record_end - chunk;
            low_block(part.low_start + chunk * low_.num_lines,
                      rest < kBlockLowRecords ? rest : kBlockLowRecords, rest - kBlockLowRecords);
        }
        finish(partial);
    }

  private:
    void prepare(const uint16_t* query) {
        alignas(64) uint8_t header[header_lines(D) * kLine];
        const KeyFrame frame(stream_.view(0, header_lines(D), header), D);
        for (int c = 0; c < D; c += 16) store(s_.unit + c, load_fp16(frame.unit + c));
        for (int c = 0; c < P; c += 16) store(s_.magnitude + c, splat(0.0f));
        __builtin_memset(s_.ones, 1, P);
        // With a soft cap the logits become powers of two only behind it.
        const F scale = splat(layer_.softcap == 0.0f ? layer_.scale * kLog2E : layer_.scale);
        for (int g = 0; g < G; ++g) {
            F most = splat(0.0f), product = splat(0.0f);
            for (int c = 0; c < D; c += 16) {
                const F q = mul(load_half(query + g * D + c, layer_.dtype), scale);
                most = vmax(most, vabs(q));
                store(s_.query[g] + c, q);
            }
            for (int r = 0; r < D; ++r) s_.ranked[g][r] = s_.query[g][frame.order[r]];
            for (int c = 0; c < D; c += 16) {
                product = fma(load(s_.ranked[g] + c), load_fp16(frame.center + c), product);
            }
            s_.center[g] = sum(product);
            const float largest_query = largest(most);
            s_.amplitude[g] = largest_query > 0.0f ? largest_query : 1.0f;
            const F inverse = splat(1.0f / s_.amplitude[g]);
            for (int c = 0; c < P; c += 16) {
                const auto divide = [&](float* q) {
                    const F unit = c < D ? mul(load(q), inverse) : splat(0.0f);
                    store(q, unit);
                    return unit;
                };
                divide(s_.query[g] + c);
                const F unit = divide(s_.ranked[g] + c);
                store(s_.magnitude + c, vmax(load(s_.magnitude + c), vabs(unit)));
            }
        }
    }

    F cap(F logit) const {
        if (layer_.softcap == 0.0f) return logit;
        return mul(splat(layer_.softcap * kLog2E), tanh(mul(logit, splat(1.0f / layer_.softcap))));
    }

    void raise(const F (&most)[G]) {
        for (int g = 0; g < G; ++g) {
            const float top = largest(most[g]);
            if (top <= s_.top[g]) continue;
            const float factor = largest(exp2(splat(s_.top[g] - top)));
            s_.top[g] = top;
            s_.total[g] *= factor;
            for (int v = 0; v < V; ++v) s_.zeros[v][g] = mul(s_.zeros[v][g], splat(factor));
            for (int c = 0; c < D; c += 16) {
                store(s_.high_out[g] + c, mul(load(s_.high_out[g] + c), splat(factor)));
                store(s_.low_out[g] + c, mul(load(s_.low_out[g] + c), splat(factor)));
            }
        }
    }

    int tokens_of(const Part& part, int group) const {
        const int rest = part.high_tokens - group * kHighRecordTokens;
        return rest < kHighRecordTokens ? rest : kHighRecordTokens;
    }

    const uint8_t* group(int g, uint8_t* buffer) const {
        return stream_.view(high_.high_record_line(g), high_.num_lines, buffer);
    }

    void high_keys(const Part& part, float* weights, int stride) {
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
            offset[g] = splat_i(sum_i(total) * 128);
        }
        for (int at = part.high_record_begin; at < part.high_record_end; ++at, weights += kHighRecordTokens) {
            if (at + kHighRecordsAhead < part.high_record_end) {
                stream_.prefetch(high_.high_record_line(at + kHighRecordsAhead), high_.num_lines);
            }
            const uint8_t* record = group(at, s_.buffer[0]);
#if defined(MIKV_USE_AMX)
            high_key_tiles(record, s_.queries[0], s_.products[0]);
#else
            key_dots<D, G, 1, false>(record, s_.queries[0], s_.products[0]);
#endif
            const F scale = load_fp16(reinterpret_cast<const uint16_t*>(record + high_.key_scales));
            for (int g = 0; g < G; ++g) {
                const F product = to_float(sub_i(s_.products[0].at(g, 0), offset[g]));
                const F logit = cap(mul(product, mul(scale, step[g])));
                store(weights + g * stride, first_lanes(logit, tokens_of(part, at), splat(kNever)));
            }
        }
    }

    void full_keys(const Part& part, float* weights, int stride) {
        for (int at = part.high_record_begin; at < part.high_record_end; ++at, weights += kHighRecordTokens) {
            const uint8_t* record = group(at, s_.buffer[0]);
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
                store(weights + g * stride,
                      first_lanes(cap(load(logits[g])), tokens_of(part, at), splat(kNever)));
            }
        }
    }

    // Logits of all high tokens of the part -> weights; adds them to the totals.
    void high_weights(const Part& part, float* weights, int stride) {
        const int count = (part.high_record_end - part.high_record_begin) * kHighRecordTokens;
        F most[G];
        for (int g = 0; g < G; ++g) {
            most[g] = splat(kNever);
            for (int t = 0; t < count; t += 16) most[g] = vmax(most[g], load(weights + g * stride + t));
        }
        raise(most);
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

    void high_values(const Part& part, const float* weights, int stride) {
        for (int at = part.high_record_begin; at < part.high_record_end; at += kBlockHighRecords) {
            const int rest = part.high_record_end - at;
            const int count = rest < kBlockHighRecords ? rest : kBlockHighRecords;
            F most[1][G];
            for (int g = 0; g < G; ++g) most[0][g] = splat(0.0f);
            for (int i = 0; i < count; ++i, weights += kHighRecordTokens) {
                const uint8_t* record = s_.records[i] = group(at + i, s_.buffer[i]);
                const uint16_t* p = reinterpret_cast<const uint16_t*>(record + high_.value_scales);
                // Unused slots hold anything, NaN included.
                const F scale = first_lanes(load_fp16(p), tokens_of(part, at + i), splat(0.0f));
                for (int g = 0; g < G; ++g) {
                    const F w = mul(load(weights + g * stride), scale);
                    most[0][g] = vmax(most[0][g], w);
                    store(s_.weights[0][g] + i * kHighRecordTokens, w);
                }
            }
            float steps[1][G];
            split_weights<1>(most, count * kHighRecordTokens, steps);
            s_.sums.clear();
            for (int i = 0; i < count; ++i) {
                value_dots<D, G, kHighRecordTokens / 4, false>(s_.records[i] + high_.values, s_.weight_bytes,
                                                    split_place(i * kHighRecordTokens / 4), s_.sums);
            }
            flush<1>(steps, s_.high_out);
        }
    }

    void full_values(const Part& part, const float* weights, int stride) {
        for (int at = part.high_record_begin; at < part.high_record_end; ++at, weights += kHighRecordTokens) {
            const uint8_t* record = group(at, s_.buffer[0]);
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

    // s_.weights -> pairs of bytes; steps[v][g] is what one unit of them stands for.
    template <int Slices>
    void split_weights(const F (&most)[Slices][G], int tokens, float (&steps)[Slices][G]) {
        for (int v = 0; v < Slices; ++v) {
            for (int g = 0; g < G; ++g) {
                const float top = largest(most[v][g]);
                const F inverse = splat(top > 0.0f ? 65535.0f / top : 0.0f);
                steps[v][g] = top / 65535.0f;
                for (int t = tokens; t % 64; t += 16) {
                    store(s_.weights[v][g] + t, splat(0.0f));
                }
                for (int t = 0; t < tokens; t += 64) {
                    I x[4];
                    for (int i = 0; i < 4; ++i) {
                        x[i] = to_int(mul(load(s_.weights[v][g] + t + 16 * i), inverse));
                    }
                    split_unsigned(x, s_.weight_bytes.of[v].high[g] + t,
                                   s_.weight_bytes.of[v].low[g] + t);
                }
            }
        }
    }

    template <int Slices> void flush(const float (&steps)[Slices][G], float (&out)[G][D]) {
        for (int g = 0; g < G; ++g) {
            for (int c = 0; c < D; c += 16) {
                const F step = splat(steps[c * Slices / D][g]);
                const F high = to_float(load_i(s_.sums.high[g] + c));
                const F low = to_float(load_i(s_.sums.low[g] + c));
                store(out[g] + c,
                      fma(fma(high, splat(256.0f), low), step, load(out[g] + c)));
            }
        }
    }

    // `after`: chunks that follow the block's.
    void low_block(int line, int count, int after) {
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
        low_logits(count, steps, zeros);
        float weight_steps[V][G];
        low_weights(count, weight_steps);
        for (int i = 0; i < count; ++i) {
            unpack(s_.records[i] + low_.values, low_.value_bits, kLowRecordTokens * D / kLine,
                   s_.tiles + i * kLowRecordTokens * D);
        }
#if defined(MIKV_USE_AMX)
        low_value_tiles<D, G>(s_.tiles, s_.value_zeros, count * kLowRecordTokens, s_.weight_bytes, s_.sums);
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
            value_dots<D, G, kLowRecordTokens / 4, true>(s_.tiles + i * kLowRecordTokens * D, s_.weight_bytes,
                                               split_place(i * kLowRecordTokens / 4), s_.sums);
        }
#endif
        flush<V>(weight_steps, s_.low_out);
    }

    // Folds a chunk's channel scales into the queries and rounds them to 15 bits. Returns what one
    // unit is: one amplitude serves all heads, so that one reduction over the channels does.
    // Without AMX also takes the products with the zero points, in these units.
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
                zero_points[i] = keys_per_token_ ? splat(1.0f)
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
                    // With the rounded query, so that most of its error cancels against that of
                    // the products: integers and zero points have opposite signs.
                    if constexpr (!kAmx) zero = fma(to_float(x[i]), zero_points[at], zero);
                }
                split_signed(x, queries.high[g] + c, queries.low[g] + c);
            }
            if constexpr (!kAmx) zeros[g] = sum(zero);
        }
        return amplitude / 16383.0f;
    }

    // Products of a block -> logits, and the new tops.
    void low_logits(int count, const float (&steps)[kBlockLowRecords],
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
                    const F logit = cap(keys_per_token_ ? balanced_logit(i, half, product, zero, step)
                                                  : fma(product, splat(step), constant));
                    most[g] = vmax(most[g], logit);
                    store(s_.logits[g] + i * kLowRecordTokens + 16 * half, logit);
                }
            }
        }
        raise(most);
    }

    // `sum`: of the query's integers.
    F balanced_logit(int record, int half, F product, float sum, float step) const {
        const uint8_t* at = s_.records[record] + 16 * half;
        const F scale = decode_scale(load_u8(at + low_.key_scales));
        const F zero = to_float(load_s8(at + low_.key_zeros));
        return mul(fma(zero, splat(sum), product), mul(scale, splat(step)));
    }

    // Logits of a block -> weights times value scales; adds to totals and zeros.
    void low_weights(int count, float (&steps)[V][G]) {
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
                const F scale = decode_scale(load_u8(record + low_.value_scales + v * kLowRecordTokens));
                const uint8_t* zeros = record + low_.value_zeros + v * kLowRecordTokens;
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
        split_weights<V>(most, count * kLowRecordTokens, steps);
    }

    void finish(Partial partial) {
        for (int g = 0; g < G; ++g) {
            float* low = s_.low_out[g];
            for (int c = 0; c < D; c += 16) {
                const float zero = sum(s_.zeros[c / Shape<D>::group_channels][g]);
                store(low + c, add(load(low + c), splat(zero)));
            }
            rotate(low, D);
            for (int c = 0; c < D; c += 16) {
                store(partial.out + g * D + c, add(load(low + c), load(s_.high_out[g] + c)));
            }
            partial.top[g] = s_.top[g];
            partial.total[g] = s_.total[g];
        }
    }

    const Layer& layer_;
    const Stream& stream_;
    const HighLayout& high_;
    const LowLayout& low_;
    const bool keys_per_token_;
    S& s_;
};

}  // namespace mikv::MIKV_ISA
