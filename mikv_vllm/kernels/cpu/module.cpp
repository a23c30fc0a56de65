// The Python module `mikv_vllm.kernels.cpu._C`. Its functions take addresses and run the kernels of
// the best instruction set (ISA) that this machine has.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

// The layout is the same for every ISA.
#define MIKV_ISA scalar
#include "api.hpp"
#include "layout.hpp"

namespace nb = nanobind;
using namespace mikv;

namespace {

#if defined(MIKV_X86)
// Whether the processor has AMX and the operating system lets this process use it.
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

// One attention layer, with its own copies of the index tables and sinks.
class LayerHandle {
  public:
    LayerHandle(int head_dim, int num_heads, int num_kv_heads, int block_size, int high_bits,
                int dtype, float scale, float softcap, uintptr_t sinks, float decay, int recent,
                uintptr_t key_index, uintptr_t value_index) {
        const int size = block_size * head_dim;
        key_index_.assign(pointer<const int32_t>(key_index),
                          pointer<const int32_t>(key_index) + size);
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
                int64_t out_stride, uintptr_t drafts, int64_t slot_stride,
                int64_t draft_head_stride, int64_t draft_stride) const {
        nb::gil_scoped_release unlocked;
        active->decode(
            layer_, {pointer<uint8_t>(cache), page_stride, head_stride},
            {pointer<const Row>(batch_rows), num_rows, pointer<const int32_t>(tables), max_pages},
            {rows(q, q_stride), rows(k, k_stride), rows(v, v_stride), rows(out, out_stride)},
            {pointer<float>(drafts), slot_stride, draft_head_stride, draft_stride});
    }

    void score(uintptr_t cache, int64_t page_stride, int64_t head_stride, uintptr_t table,
               int num_tokens, uintptr_t queries, int64_t stride, int num_queries, uintptr_t scores,
               int64_t score_stride) const {
        nb::gil_scoped_release unlocked;
        active->score(layer_, {pointer<uint8_t>(cache), page_stride, head_stride},
                      pointer<const int32_t>(table), num_tokens, rows(queries, stride), num_queries,
                      pointer<float>(scores), score_stride);
    }

    void compress(uintptr_t cache, int64_t page_stride, int64_t head_stride, uintptr_t native_table,
                  uintptr_t tiered_table, int num_tokens, int tiered_pages, int high_tokens,
                  int low_records, int low_end_line, int key_code, int value_bits, int recent,
                  uintptr_t scores, int64_t score_stride, uintptr_t queries, int64_t query_stride,
                  int num_queries) const {
        nb::gil_scoped_release unlocked;
        active->compress(
            layer_, {pointer<uint8_t>(cache), page_stride, head_stride},
            {pointer<const int32_t>(native_table), pointer<const int32_t>(tiered_table), num_tokens,
             tiered_pages, high_tokens, low_records, low_end_line, key_code, value_bits, recent,
             pointer<const float>(scores), score_stride, rows(queries, query_stride), num_queries});
    }

    void restore(uintptr_t cache, int64_t page_stride, int64_t head_stride, uintptr_t table,
                 int high_tokens, int low_records, int low_end_line, int key_code, int value_bits,
                 uintptr_t target, int64_t target_page_stride, int64_t target_head_stride) const {
        nb::gil_scoped_release unlocked;
        active->restore(layer_, {pointer<uint8_t>(cache), page_stride, head_stride},
                        {pointer<const int32_t>(table), high_tokens, low_records, low_end_line,
                         key_code, value_bits},
                        {pointer<uint8_t>(target), target_page_stride, target_head_stride});
    }

    void extend(uintptr_t cache, int64_t page_stride, int64_t head_stride, uintptr_t table,
                int high_tokens, int low_records, int low_end_line, int key_code, int value_bits,
                int demoted_records, uintptr_t k, int64_t k_stride, uintptr_t v, int64_t v_stride,
                int num_tokens, uintptr_t scores, int64_t score_stride, int recent,
                float keep) const {
        nb::gil_scoped_release unlocked;
        active->extend(layer_, {pointer<uint8_t>(cache), page_stride, head_stride},
                       {{pointer<const int32_t>(table), high_tokens, low_records, low_end_line,
                         key_code, value_bits},
                        demoted_records,
                        rows(k, k_stride),
                        rows(v, v_stride),
                        num_tokens,
                        pointer<const float>(scores),
                        score_stride,
                        recent,
                        keep});
    }

  private:
    // See Layer::key_runs.
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

// Constants of layout.hpp, by their names in Python.
std::map<std::string, double> constants() {
    using namespace scalar;
    return {{"LINE_BYTES", kLine},
            {"LOW_RECORD_TOKENS", kLowRecordTokens},
            {"HIGH_RECORD_TOKENS", kHighRecordTokens},
            {"BAND_CHANNELS", kBandChannels},
            {"VALUE_GROUP", kValueGroup},
            {"KEY_ZERO_STEPS", kKeyZeroSteps},
            {"CHANNEL_MARGIN", kChannelMargin},
            {"TOKEN_MARGIN", kTokenMargin},
            {"NATIVE_BYTES", kNativeBytes},
            {"KEYS_PER_TOKEN_BIT", kKeysPerTokenBit},
            {"SCALE_BIAS", kScaleBias},
            {"HIGH_OFFSET", kHighOffset}};
}

// Byte offsets and sizes of layout.hpp, by the names of the properties in tiers/formats.py.
std::map<std::string, int> header_layout(int head_dim) {
    const scalar::HeaderLayout header(head_dim);
    return {{"centers", 0},
            {"units", header.units},
            {"order", header.order},
            {"num_bytes", header.num_lines * scalar::kLine}};
}

std::map<std::string, int> high_layout(int head_dim, int high_bits) {
    const scalar::HighLayout high(head_dim, high_bits);
    return {{"keys", 0},
            {"values", high.values},
            {"key_scales", high.key_scales},
            {"value_scales", high.value_scales},
            {"scores", high.scores},
            {"num_bytes", high.num_lines * scalar::kLine}};
}

std::map<std::string, int> low_layout(int head_dim, int key_code, int value_bits) {
    const scalar::LowLayout low(head_dim, key_code, value_bits);
    return {{"value_groups", low.value_groups(head_dim)},
            {"keys", 0},
            {"values", low.values},
            {"key_scales", low.key_scales},
            {"key_zeros", low.key_zeros},
            {"value_scales", low.value_scales},
            {"value_zeros", low.value_zeros},
            {"num_bytes", low.num_lines * scalar::kLine}};
}

std::vector<int> band_bits(int head_dim, int key_code) {
    const scalar::LowLayout low(head_dim, key_code, 2);
    std::vector<int> bits(low.bands());
    for (int band = 0; band < low.bands(); ++band) bits[band] = low.band_bits(band);
    return bits;
}

}  // namespace

NB_MODULE(_C, m) {
    active = choose();
    m.def("isa", [] { return std::string(active->name); });
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : usable_kernels()) names.emplace_back(kernels->name);
        return names;
    });
    m.def("set_isa", [](const std::string& name) { active = find(name); });
    m.def("constants", &constants);
    m.def("header_layout", &header_layout);
    m.def("high_layout", &high_layout);
    m.def("low_layout", &low_layout);
    m.def("band_bits", &band_bits);
    m.def("page_bytes", &scalar::page_bytes);
    nb::class_<LayerHandle>(m, "Layer")
        .def(nb::init<int, int, int, int, int, int, float, float, uintptr_t, float, int, uintptr_t,
                      uintptr_t>())
        .def("decode", &LayerHandle::decode)
        .def("score", &LayerHandle::score)
        .def("compress", &LayerHandle::compress)
        .def("restore", &LayerHandle::restore)
        .def("extend", &LayerHandle::extend);
}
