// Temporary memory. Each thread keeps its block and reuses it in later calls.
#include "scratch.hpp"

#include <cstdlib>
#include <new>

namespace mikv {
namespace {

struct Memory {
    uint8_t* data = nullptr;
    size_t size = 0;
    ~Memory() { std::free(data); }
};

}  // namespace

uint8_t* scratch_memory(size_t num_bytes) {
    thread_local Memory memory;
    if (num_bytes > memory.size) {
        std::free(memory.data);
        memory.size = (num_bytes + num_bytes / 4 + 4095) / 4096 * 4096;
        memory.data = static_cast<uint8_t*>(std::aligned_alloc(64, memory.size));
        if (!memory.data) {
            memory.size = 0;
            throw std::bad_alloc();
        }
    }
    return memory.data;
}

}  // namespace mikv
