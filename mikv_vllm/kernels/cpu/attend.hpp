// Attention of a few query heads that share a KV head over a part of the tiers of one request.
#pragma once

#include "attend_high.hpp"
#include "attend_low.hpp"

namespace mikv::MIKV_ISA {

// Result for one part, as a softmax that is not normalized yet: outputs are sums of
// 2**(logit - top) * value.
struct Partial {
    float* out;                     // [heads, head_dim]
    float *top, *total, *high_top;  // [heads]; high_top: the top that the kept weights refer to
};

template <int D, int G> class Attention {
  public:
    Attention(const Layer& layer, const Stream& stream, const HighLayout& high,
              const LowLayout& low, AttendState<D, G>& state)
        : layer_(layer),
          stream_(stream),
          high_(layer, stream, high, state),
          low_(layer, stream, low, state),
          s_(state) {}

    // Computes `partial`. Writes the weights 2**(logit - high_top) of the high tokens to `weights`,
    // G rows of `stride` numbers.
    void run(const uint16_t* query, const float* sinks, const Part& part, float* weights,
             int stride, Partial partial) {
#if defined(MIKV_USE_AMX)
        const TileConfig config(2 * G);
#endif
        // Prefetches what is read first; the loops prefetch what follows. The processor's own
        // prefetcher does not keep up: runs of consecutive lines end with the page.
        stream_.prefetch(0, header_lines(D));
        high_.prefetch(part);
        s_.start(layer_, stream_, query, sinks);
        low_.prefetch(part);
        high_.run(part, weights, stride);
        for (int g = 0; g < G; ++g) partial.high_top[g] = s_.top[g];
        low_.run(part);
        finish(partial);
    }

  private:
    // Adds the zero points of the low values, rotates the low output back, and adds the high
    // output.
    void finish(Partial partial) {
        for (int g = 0; g < G; ++g) {
            float* low = s_.low_out[g];
            for (int c = 0; c < D; c += 16) {
                const float zero = sum(s_.zeros[c / Shape<D>::value_group_channels][g]);
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
    HighAttention<D, G> high_;
    LowAttention<D, G> low_;
    AttendState<D, G>& s_;
};

}  // namespace mikv::MIKV_ISA
