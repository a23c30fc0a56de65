// Choices and orders, and the calls' memory. Compiled for the baseline machine: here
// the standard library's templates are safe from being merged with copies made for another ISA.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "api.hpp"

namespace mikv {
namespace {

// Orders like the float; 0.0 and -0.0 are equal, NaN is largest.
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

struct Workspace {
    uint8_t* memory = nullptr;
    size_t size = 0;
    ~Workspace() { std::free(memory); }
};

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

void select_least(const float* scores, int num_tokens, int count, uint64_t* keys,
                  uint8_t* chosen) {
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

uint8_t* workspace(size_t num_bytes) {
    thread_local Workspace space;
    if (num_bytes > space.size) {
        std::free(space.memory);
        space.size = (num_bytes + num_bytes / 4 + 4095) / 4096 * 4096;
        space.memory = static_cast<uint8_t*>(std::aligned_alloc(64, space.size));
        if (!space.memory) {
            space.size = 0;
            throw std::bad_alloc();
        }
    }
    return space.memory;
}

}  // namespace mikv
