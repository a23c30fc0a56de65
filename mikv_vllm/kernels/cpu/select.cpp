// Selection and sorting. Function templates of the standard library are used only in files that are
// compiled once, for the baseline instruction set: of several compiled copies, the linker keeps
// any.
#include "select.hpp"

#include <algorithm>
#include <cstring>

namespace mikv {
namespace {

// An integer that compares as the float does; 0.0 and -0.0 are equal, NaN is largest.
uint32_t ordered(float score) {
    score += 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &score, 4);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

void choose_smallest(uint64_t* keys, int num_tokens, int count, uint8_t* chosen) {
    std::memset(chosen, 0, static_cast<size_t>(num_tokens));
    if (count <= 0) return;
    if (count < num_tokens) std::nth_element(keys, keys + count - 1, keys + num_tokens);
    for (int i = 0; i < count; ++i) chosen[static_cast<uint32_t>(keys[i])] = 1;
}

}  // namespace

void select_high(const float* scores, int num_tokens, int num_high, int recent, uint64_t* keys,
                 uint8_t* chosen) {
    const int older = num_tokens - recent;
    for (int i = 0; i < older; ++i) {
        keys[i] = static_cast<uint64_t>(~ordered(scores[i])) << 32 | static_cast<uint32_t>(i);
    }
    choose_smallest(keys, older, num_high - recent, chosen);
    std::memset(chosen + older, 1, static_cast<size_t>(recent));
}

void select_least(const float* scores, int num_tokens, int count, uint64_t* keys, uint8_t* chosen) {
    for (int i = 0; i < num_tokens; ++i) {
        keys[i] = static_cast<uint64_t>(ordered(scores[i])) << 32 | static_cast<uint32_t>(i);
    }
    choose_smallest(keys, num_tokens, count, chosen);
}

void order_by_cost(const float* cost, int num_channels, int32_t* order) {
    for (int i = 0; i < num_channels; ++i) order[i] = i;
    std::sort(order, order + num_channels, [cost](int32_t a, int32_t b) {
        const uint32_t first = ordered(cost[a]), second = ordered(cost[b]);
        return first != second ? first > second : a < b;
    });
}

}  // namespace mikv
