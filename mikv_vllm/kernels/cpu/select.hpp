// Choice of tokens by importance, and order of channels by cost.
//
// Of equal scores or costs, the one with the smaller position is chosen first, as in the oracle
// (tiers/reference.py). `keys` is scratch of one number per token.
#pragma once

#include <cstdint>

namespace mikv {

// Sets chosen[i] to 1 for the tokens of the high tier, the `recent` newest and the most important
// of the others, and to 0 for all other tokens.
void select_high(const float* scores, int num_tokens, int num_high, int recent, uint64_t* keys,
                 uint8_t* chosen);

// Sets chosen[i] to 1 for the `count` least important tokens, to 0 for the others.
void select_least(const float* scores, int num_tokens, int count, uint64_t* keys, uint8_t* chosen);

// Writes the channels in order of falling cost.
void order_by_cost(const float* cost, int num_channels, int32_t* order);

}  // namespace mikv
