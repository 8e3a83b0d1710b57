// Chooses the instruction set at run time and runs kernels on torch's threads.
#include "ops.h"

#include <ATen/Parallel.h>
#include <omp.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

namespace moesd {

extern const KernelTable kPortableTable;
#ifdef MOESD_X86_KERNELS
extern const KernelTable kAvx2Table, kAvx512Table, kAvx512Bf16Table, kAmxTable;
#endif

namespace {

struct Candidate {
    const KernelTable* table;
    bool supported;
};

#ifdef MOESD_X86_KERNELS
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vnni");
}

// Whether the kernel lets this process use tiles, which it has to be asked for because their state
// is large.
bool may_use_tiles() {
#ifdef __linux__
    // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA.
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

const KernelTable& choose() {
    // Best first.
    Candidate candidates[] = {
#ifdef MOESD_X86_KERNELS
        {&kAmxTable, has_avx512_bf16() && __builtin_cpu_supports("amx-tile") &&
                         __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") &&
                         may_use_tiles()},
        {&kAvx512Bf16Table, has_avx512_bf16()},
        {&kAvx512Table, has_avx512()},
        {&kAvx2Table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c")},
#endif
        {&kPortableTable, true},
    };
    const char* forced = std::getenv("MOESD_CPU_ISA");
    if (!forced || !*forced) {
        for (const Candidate& c : candidates) {
            if (c.supported) return *c.table;
        }
    }
    std::string known;
    for (const Candidate& c : candidates) {
        if (std::string(forced) == c.table->name) {
            TORCH_CHECK(c.supported, "MOESD_CPU_ISA=", forced,
                        " is not supported by this processor");
            return *c.table;
        }
        known = c.table->name + (known.empty() ? "" : ", " + known);
    }
    TORCH_CHECK(false, "MOESD_CPU_ISA must be one of ", known, ", got ", forced);
}

// The names of moesd_kernels/experts/activations.py, which also knows their aliases.
constexpr struct {
    const char* name;
    Activation kind;
} kActivations[] = {
    {"silu", Activation::kSilu},          {"gelu", Activation::kGelu},
    {"gelu_tanh", Activation::kGeluTanh}, {"relu", Activation::kRelu},
    {"relu2", Activation::kRelu2},
};

std::vector<std::string> activation_names() {
    std::vector<std::string> names;
    for (const auto& known : kActivations) names.push_back(known.name);
    return names;
}

}  // namespace

const KernelTable& kernels() {
    static const KernelTable& table = choose();
    return table;
}

DType storage_dtype(const at::Tensor& t, const char* what) {
    switch (t.scalar_type()) {
        case at::kFloat: return DType::kFloat32;
        case at::kBFloat16: return DType::kBFloat16;
        case at::kHalf: return DType::kFloat16;
        default:
            TORCH_CHECK_TYPE(false, what, " must be float32, bfloat16 or float16, got ",
                             t.scalar_type());
    }
}

void check_like(const at::Tensor& t, const char* name, at::IntArrayRef sizes,
                const at::Tensor& like, const char* like_name) {
    TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must be ", sizes, ", got ", t.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, " must be ", like.scalar_type(),
                     " like ", like_name, ", got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.is_contiguous(), name, " must be contiguous, got strides ", t.strides());
}

Activation parse_activation(c10::string_view name) {
    for (const auto& known : kActivations) {
        if (name == known.name) return known.kind;
    }
    std::string names;
    for (const std::string& known : activation_names()) {
        const bool last = known == std::end(kActivations)[-1].name;
        names += (names.empty() ? "" : last ? " or " : ", ") + known;
    }
    TORCH_CHECK_VALUE(false, "activation must be ", names, ", got ", name);
}

void* scratch(size_t bytes) {
    thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, &std::free);
    thread_local size_t capacity = 0;
#ifdef __SANITIZE_ADDRESS__
    // New memory for each call, no larger than asked for: then a step beyond it is seen.
    constexpr size_t kAlign = 64, kSpare = 0;
    capacity = 0;
#else
    constexpr size_t kAlign = 4096, kSpare = 1;
#endif
    if (bytes > capacity) {
        memory.reset();
        capacity = 0;  // a caller may catch the error below and come again
        const size_t size = (bytes + kSpare * (bytes / 2) + kAlign - 1) / kAlign * kAlign;
        memory.reset(std::aligned_alloc(kAlign, size));
        TORCH_CHECK(memory, "out of memory: could not allocate ", size, " bytes of scratch");
        capacity = size;
    }
    return memory.get();
}

int max_threads() {
    static const int cores = omp_get_num_procs();
    return std::min(at::get_num_threads(), cores);
}

int team_size(int64_t multiply_adds) {
    // A few microseconds of work, about what waking a thread costs.
    constexpr int64_t kWorthAThread = 100'000;
    if (at::in_parallel_region()) return 1;
    return static_cast<int>(
        std::max<int64_t>(1, std::min<int64_t>(max_threads(), multiply_adds / kWorthAThread)));
}

void run_team(int threads, void (*body)(void*), void* ctx) {
    if (threads <= 1) return body(ctx);
    // Not at::parallel_for, which wakes as many threads as torch was told to use, even if there are
    // fewer cores; with no more than that, these are the same threads.
#pragma omp parallel num_threads(max_threads())
    if (omp_get_thread_num() < threads) body(ctx);
}

TORCH_LIBRARY_IMPL(moesd, CompositeExplicitAutograd, m) {
    m.impl("cpu_isa", [] { return std::string(kernels().name); });
    m.impl("activation_names", &activation_names);
}

}  // namespace moesd
