// Splits a block of scratch memory into arrays.
#pragma once

#include "layout.hpp"
#include "scratch.hpp"

namespace mikv::MIKV_ISA {

struct Arena {
    uint8_t* next;
    // An array of `count` elements, 64-byte aligned and uninitialized.
    template <class T> T* take(size_t count) {
        T* result = reinterpret_cast<T*>(next);
        next += (count * sizeof(T) + kLine - 1) / kLine * kLine;
        return result;
    }
};

}  // namespace mikv::MIKV_ISA
