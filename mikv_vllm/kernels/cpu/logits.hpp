// Logits of attention.
#pragma once

#include "simd.hpp"

namespace mikv::MIKV_ISA {

constexpr float kNever = -1e30f;  // stands for minus infinity; below the logit of any token

// softcap * tanh(logit / softcap), times `unit`.
inline F soft_cap(F logit, float softcap, float unit) {
    return mul(splat(softcap * unit), tanh(mul(logit, splat(1.0f / softcap))));
}

}  // namespace mikv::MIKV_ISA
