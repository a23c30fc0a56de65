// Temporary memory of one call into the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mikv {

// Memory of at least `num_bytes` bytes, 64-byte aligned. It belongs to the calling thread and is
// valid until that thread's next call of this function.
uint8_t* scratch_memory(size_t num_bytes);

}  // namespace mikv
