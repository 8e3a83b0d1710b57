// AVX-512-BF16, with the experts, the linear layers and the attention of bf16 on AMX tiles;
// compiled with its own flags, so it includes nothing of torch.
#define MOESD_ISA amx
#define MOESD_AVX512_BF16
#define MOESD_AMX
#include "vec_avx512.h"

#include "amx/attention.h"
#include "amx/experts_kernel.h"
#include "amx/linear_kernel.h"
#include "table.h"

namespace moesd {
namespace {

void experts(const ExpertsArgs& args) {
    if (args.dtype != DType::kBFloat16 || args.transposed) {
        return amx::run_for_dtype<amx::ExpertsKernel>(args);
    }
    amx::AmxExpertsKernel(args).run();
}

void linear(const LinearArgs& args) {
    if (args.dtype != DType::kBFloat16) return amx::run_for_dtype<amx::LinearKernel>(args);
    amx::AmxLinearKernel(args).run();
}

void attention(const AttentionArgs& args) {
    if (args.dtype != DType::kBFloat16) return amx::run_for_dtype<amx::AttentionKernel>(args);
    amx::RaggedAttention<bf16, amx::TileRows>(args).run();
}

constexpr KernelTable make_table() {
    KernelTable table = amx::make_table("amx");
    table.panels = true;
    table.experts = experts;
    table.linear = linear;
    table.attention = attention;
    return table;
}

}  // namespace

extern const KernelTable kAmxTable;
constexpr KernelTable kAmxTable = make_table();

}  // namespace moesd
