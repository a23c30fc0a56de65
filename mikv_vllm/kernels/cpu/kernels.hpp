// The kernels of one instruction set.
#pragma once

#include "api.hpp"

namespace mikv::MIKV_ISA {

void decode(const Layer&, const Cache&, const Batch&, const DecodeTensors&, const DraftWeights&);
void score(const Layer&, const Cache&, const int32_t* table, int num_tokens, Rows queries,
           int num_queries, float* scores, int64_t score_stride);
void compress(const Layer&, const Cache&, const Compression&);
void restore(const Layer&, const Cache&, const Tiers&, const Cache& target);
void extend(const Layer&, const Cache&, const Extension&);

}  // namespace mikv::MIKV_ISA
