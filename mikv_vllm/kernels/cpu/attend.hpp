// Attention of a few query heads that share a KV head over a part of the blocks of one request.
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

// Call start() with the queries, run() for each block, and finish(). With AMX, the caller sets the
// tile configuration.
template <int D, int G> class Attention {
  public:
    Attention(const Layer& layer, const HighLayout& high, AttendState<D, G>& state)
        : layer_(layer), high_(high), s_(state) {}

    void start(const uint16_t* query, const float* sinks) { s_.start(layer_, query, sinks); }

    // Adds a part of a block to the sums. Writes the weights 2**(logit - high_top) of its high
    // tokens to `weights`, G rows of `stride` numbers, and high_top to `high_top`.
    void run(const Stream& stream, const LowLayout& layout, const Part& part, float* weights,
             int stride, float* high_top) {
        HighAttention<D, G> high(layer_, stream, high_, s_);
        LowAttention<D, G> low(layer_, stream, layout, s_);
        // Prefetches what is read first; the loops prefetch what follows. The processor's own
        // prefetcher does not keep up: runs of consecutive lines end with the page.
        stream.prefetch(0, header_lines(D));
        high.prefetch(part);
        low.prefetch(part);
        s_.enter(stream);
        high.run(part, weights, stride);
        for (int g = 0; g < G; ++g) high_top[g] = s_.top[g];
        low.run(part);
    }

    // Adds the zero points of the low values, rotates the low output back, and adds the high
    // output. Writes `partial`, without its high_top.
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

  private:
    const Layer& layer_;
    const HighLayout& high_;
    AttendState<D, G>& s_;
};

}  // namespace mikv::MIKV_ISA
