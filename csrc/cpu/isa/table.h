// Builds one instruction set's KernelTable. Included once by each isa_*.cpp after its vector
// header.
#pragma once

#include "../kernels/attention_kernel.h"
#include "../kernels/experts_kernel.h"
#include "../kernels/int8/experts_int8_kernel.h"
#include "../kernels/int8/linear_int8_kernel.h"
#include "../kernels/int8/linear_rows_kernel.h"
#include "../kernels/linear_kernel.h"
#include "../kernels/recurrent/convolution_kernel.h"
#include "../kernels/recurrent/delta_rule_kernel.h"
#include "../kernels/recurrent/gated_norm_kernel.h"
#include "../kernels/recurrent/state_space_kernel.h"
#include "../kernels/rope_kernel.h"
#include "../kernels/row_kernels.h"
#include "../kernels/sampling/argmax_kernel.h"
#include "../kernels/sampling/race_kernel.h"
#if defined(MOESD_AMX)
#include "amx/product.h"
#endif
#ifdef MOESD_AVX512_BF16
#include "../kernels/int8/vnni/product.h"
#include "../kernels/int8/vnni/row_product.h"
#endif

namespace moesd::MOESD_ISA {

template <template <class> class Kernel, class Args>
void run_for_dtype(const Args& args) {
    switch (args.dtype) {
        case DType::kFloat32: return Kernel<float>(args).run();
        case DType::kBFloat16: return Kernel<bf16>(args).run();
        case DType::kFloat16: return Kernel<half>(args).run();
    }
}

#if defined(MOESD_AMX)
using IntegerProduct = AmxProduct;
#elif defined(MOESD_AVX512_BF16)
using IntegerProduct = VnniProduct;  // processors that have the one have the other
#else
using IntegerProduct = PlainProduct;
#endif
#ifdef MOESD_AVX512_BF16
using RowProduct = VnniRowProduct;
#else
using RowProduct = PlainRowProduct;
#endif
template <class W>
using ExpertsInt8 = ExpertsInt8Kernel<W, IntegerProduct>;
template <class W>
using LinearInt8 = LinearInt8Kernel<W, IntegerProduct>;
template <class W>
using LinearRows = LinearRowsKernel<W, RowProduct>;

// constexpr: nothing compiled for a wider instruction set may run while the library loads.
constexpr KernelTable make_table(const char* name) {
    return {name,
            false,
            run_for_dtype<ExpertsKernel, ExpertsArgs>,
            run_for_dtype<LinearKernel, LinearArgs>,
            run_for_dtype<ExpertsInt8, ExpertsArgs>,
            [](const LinearArgs& args) {
                if (rows_have_scales(args.w, args.depth)) run_for_dtype<LinearRows>(args);
                else run_for_dtype<LinearInt8>(args);
            },
            run_for_dtype<AttentionKernel, AttentionArgs>,
            run_for_dtype<NormKernel, NormArgs>,
            run_for_dtype<RopeKernel, RopeArgs>,
            run_for_dtype<ActKernel, ActArgs>,
            run_for_dtype<RouterKernel, RouterArgs>,
            run_for_dtype<ArgmaxKernel, ArgmaxArgs>,
            [](const RaceArgs& args) { RaceKernel(args).run(); },
            run_for_dtype<DeltaRuleKernel, DeltaRuleArgs>,
            run_for_dtype<Mamba2Kernel, StateSpaceArgs>,
            run_for_dtype<MambaKernel, StateSpaceArgs>,
            run_for_dtype<ConvolutionKernel, ConvolutionArgs>,
            run_for_dtype<GatedNormKernel, GatedNormArgs>};
}

}  // namespace moesd::MOESD_ISA
