// The Python module `mikv_vllm.kernels.cpu._C`: raw addresses in, kernels of the best ISA run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "api.hpp"

namespace nb = nanobind;
using namespace mikv;

namespace {

#if defined(MIKV_X86)
// The processor has AMX, and the kernel lets this process use it.
bool amx_usable() {
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    static const bool usable = __builtin_cpu_supports("amx-tile") &&
                               __builtin_cpu_supports("amx-int8") &&
                               !syscall(SYS_arch_prctl, kRequestPermission, kTileData);
    return usable;
#else
    return false;
#endif
}
#endif

// Best first.
std::vector<const Kernels*> usable_kernels() {
    std::vector<const Kernels*> usable;
#if defined(MIKV_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni")) {
        if (amx_usable()) usable.push_back(&amx::kernels);
        usable.push_back(&avx512::kernels);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
        usable.push_back(&avx2::kernels);
    }
#endif
    usable.push_back(&scalar::kernels);
    return usable;
}

const Kernels* find(const std::string& name) {
    std::string names;
    for (const Kernels* kernels : usable_kernels()) {
        if (kernels->name == name) return kernels;
        names += std::string(names.empty() ? "" : ", ") + kernels->name;
    }
    throw std::invalid_argument("The instruction set is '" + name +
                                "', but this machine runs one of: " + names + ".");
}

const Kernels* choose() {
    const char* forced = std::getenv("MIKV_CPU_ISA");
    return forced && *forced ? find(forced) : usable_kernels().front();
}

const Kernels* active = nullptr;

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

Rows rows(uintptr_t address, int64_t stride) { return {pointer<uint16_t>(address), stride}; }

// Owns the index tables that the kernels read.
class LayerHandle {
  public:
    LayerHandle(int head_dim, int num_heads, int num_kv_heads, int block_size, int high_bits,
                int dtype, float scale, float softcap, uintptr_t sinks, float decay, int recent,
                uintptr_t key_index, uintptr_t value_index) {
        const int size = block_size * head_dim;
        key_index_.assign(pointer<const int32_t>(key_index), pointer<const int32_t>(key_index) + size);
        value_index_.assign(pointer<const int32_t>(value_index),
                            pointer<const int32_t>(value_index) + size);
        by_channel_.resize(key_index_.size());
        for (int t = 0; t < block_size; ++t) {
            for (int c = 0; c < head_dim; ++c) {
                by_channel_[c * block_size + t] = key_index_[t * head_dim + c];
            }
        }
        if (sinks) {
            sinks_.assign(pointer<const float>(sinks), pointer<const float>(sinks) + num_heads);
        }
        layer_ = {head_dim,
                  num_heads,
                  num_kv_heads,
                  block_size,
                  high_bits,
                  dtype,
                  scale,
                  softcap,
                  decay,
                  recent,
                  sinks ? sinks_.data() : nullptr,
                  key_index_.data(),
                  value_index_.data(),
                  by_channel_.data(),
                  in_runs(key_index_),
                  in_runs(value_index_),
                  in_runs(by_channel_)};
    }

    void decode(uintptr_t cache, int64_t page_stride, int64_t head_stride, uintptr_t batch_rows,
                int num_rows, uintptr_t tables, int max_pages, uintptr_t q, int64_t q_stride,
                uintptr_t k, int64_t k_stride, uintptr_t v, int64_t v_stride, uintptr_t out,
                int64_t out_stride) const {
        nb::gil_scoped_release unlocked;
        active->decode(layer_, {pointer<uint8_t>(cache), page_stride, head_stride},
                       {pointer<const Row>(batch_rows), num_rows, pointer<const int32_t>(tables),
                        max_pages},
                       {rows(q, q_stride), rows(k, k_stride), rows(v, v_stride),
                        rows(out, out_stride)});
    }

    void score(uintptr_t cache, int64_t page_stride, int64_t head_stride, uintptr_t table,
               int num_tokens, uintptr_t queries, int64_t stride, int num_queries,
               uintptr_t scores, int64_t score_stride) const {
        nb::gil_scoped_release unlocked;
        active->score(layer_, {pointer<uint8_t>(cache), page_stride, head_stride},
                      pointer<const int32_t>(table), num_tokens, rows(queries, stride),
                      num_queries, pointer<float>(scores), score_stride);
    }

    void compress(uintptr_t cache, int64_t page_stride, int64_t head_stride,
                  uintptr_t native_table, uintptr_t tiered_table, int num_tokens,
                  int tiered_pages, int high_tokens, int low_records, int low_end_line, int key_code,
                  int value_bits, uintptr_t scores, int64_t score_stride, uintptr_t queries,
                  int64_t query_stride, int num_queries) const {
        nb::gil_scoped_release unlocked;
        active->compress(layer_, {pointer<uint8_t>(cache), page_stride, head_stride},
                         {pointer<const int32_t>(native_table), pointer<const int32_t>(tiered_table),
                          num_tokens, tiered_pages, high_tokens, low_records, low_end_line, key_code,
                          value_bits, pointer<const float>(scores), score_stride,
                          rows(queries, query_stride), num_queries});
    }

    void restore(uintptr_t cache, int64_t page_stride, int64_t head_stride, uintptr_t table,
                 int high_tokens, int low_records, int low_end_line, int key_code, int value_bits,
                 uintptr_t target, int64_t target_page_stride, int64_t target_head_stride) const {
        nb::gil_scoped_release unlocked;
        active->restore(layer_, {pointer<uint8_t>(cache), page_stride, head_stride},
                        {pointer<const int32_t>(table), high_tokens, low_records, low_end_line, key_code,
                         value_bits},
                        {pointer<uint8_t>(target), target_page_stride, target_head_stride});
    }

    void extend(uintptr_t cache, int64_t page_stride, int64_t head_stride, uintptr_t table,
                int high_tokens, int low_records, int low_end_line, int key_code, int value_bits,
                int moved_records, int demoted_records, int low_end_line_after, uintptr_t k, int64_t k_stride,
                uintptr_t v, int64_t v_stride, int num_tokens, uintptr_t scores,
                int64_t score_stride, float keep) const {
        nb::gil_scoped_release unlocked;
        active->extend(layer_, {pointer<uint8_t>(cache), page_stride, head_stride},
                       {{pointer<const int32_t>(table), high_tokens, low_records, low_end_line, key_code,
                         value_bits},
                        moved_records, demoted_records, low_end_line_after, rows(k, k_stride),
                        rows(v, v_stride), num_tokens, pointer<const float>(scores), score_stride,
                        keep});
    }

  private:
    static bool in_runs(const std::vector<int32_t>& index) {
        for (size_t i = 1; i < index.size(); ++i) {
            if (i % 16 && index[i] != index[i - 1] + 1) return false;
        }
        return true;
    }

    Layer layer_;
    std::vector<int32_t> key_index_, value_index_, by_channel_;
    std::vector<float> sinks_;
};

}  // namespace

NB_MODULE(_C, m) {
    active = choose();
    m.def("isa", [] { return std::string(active->name); });
    m.def("isas", [] {
        nb::list names;
        for (const Kernels* kernels : usable_kernels()) names.append(kernels->name);
        return names;
    });
    m.def("set_isa", [](const std::string& name) { active = find(name); });
    nb::class_<LayerHandle>(m, "Layer")
        .def(nb::init<int, int, int, int, int, int, float, float, uintptr_t, float, int, uintptr_t,
                      uintptr_t>())
        .def("decode", &LayerHandle::decode)
        .def("score", &LayerHandle::score)
        .def("compress", &LayerHandle::compress)
        .def("restore", &LayerHandle::restore)
        .def("extend", &LayerHandle::extend);
}
