// Binds the CUDA kernels to torch. Their schemas are those of csrc/register.cpp, whose library must
// be loaded first. Needs a torch built for CUDA.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <type_traits>

#include "../experts_op.h"
#include "launchers.h"
#include "layout.h"

namespace moesd {
namespace {

using at::Tensor;

Float float_type(const Tensor& tensor, const char* name) {
    switch (tensor.scalar_type()) {
        case at::kBFloat16: return Float::kBf16;
        case at::kHalf: return Float::kFp16;
        case at::kFloat: return Float::kFp32;
        default:
            TORCH_CHECK(false, name, " must be bf16, fp16 or fp32, got ", tensor.scalar_type());
    }
}

bool is_int64(const Tensor& ids) {
    TORCH_CHECK(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt,
                "topk_ids must be int32 or int64, got ", ids.scalar_type());
    TORCH_CHECK(ids.dim() == 2 && ids.is_contiguous(), "topk_ids must be contiguous [T, K], got ",
                ids.sizes());
    return ids.scalar_type() == at::kLong;
}

Plan plan_of(const Tensor& sorted_to_pair, const Tensor& blocks) {
    TORCH_CHECK(sorted_to_pair.scalar_type() == at::kInt && blocks.scalar_type() == at::kInt,
                "sorted_to_pair and blocks must be int32, got ", sorted_to_pair.scalar_type(),
                " and ", blocks.scalar_type());
    return {sorted_to_pair.data_ptr<int>(), blocks.data_ptr<int>()};
}

void plan(const Tensor& topk_ids, int64_t num_experts, int64_t block_m, Tensor& sorted_to_pair,
          Tensor& blocks) {
    const c10::cuda::CUDAGuard guard(topk_ids.device());
    const bool wide = is_int64(topk_ids);
    const int pairs = static_cast<int>(topk_ids.numel()), experts = static_cast<int>(num_experts);
    TORCH_CHECK(pairs <= kMaxPlanPairs, "topk_ids must have at most ", kMaxPlanPairs,
                " entries, got ", pairs);
    TORCH_CHECK(experts <= kMaxPlanExperts, "num_experts must be at most ", kMaxPlanExperts,
                ", got ", experts);
    const int bound = max_blocks(pairs, experts, static_cast<int>(block_m));
    TORCH_CHECK(sorted_to_pair.numel() == pairs, "sorted_to_pair must have ", pairs,
                " entries, got ", sorted_to_pair.numel());
    TORCH_CHECK(blocks.numel() == 3 * bound, "blocks must be [", bound, ", 3], got ",
                blocks.sizes());
    if (pairs == 0) return;
    C10_CUDA_CHECK(launch_plan(topk_ids.const_data_ptr(), wide, pairs, experts,
                               static_cast<int>(block_m), plan_of(sorted_to_pair, blocks),
                               c10::cuda::getCurrentCUDAStream()));
}

void combine(const Tensor& partial, const Tensor& topk_ids, const Tensor& topk_weights,
             int64_t num_experts, Tensor& out) {
    const c10::cuda::CUDAGuard guard(topk_ids.device());
    const bool wide = is_int64(topk_ids);
    const int64_t T = topk_ids.size(0), topk = topk_ids.size(1);
    TORCH_CHECK(out.dim() == 2 && out.size(0) == T && out.is_contiguous(),
                "out must be contiguous [", T, ", H], got ", out.sizes());
    const int64_t H = out.size(1);
    TORCH_CHECK(partial.scalar_type() == at::kFloat && partial.is_contiguous() &&
                    partial.numel() == T * topk * H,
                "partial must be contiguous fp32 [", T * topk, ", ", H, "], got ", partial.sizes());
    TORCH_CHECK(topk_weights.sizes() == topk_ids.sizes() && topk_weights.is_contiguous(),
                "topk_weights must be contiguous ", topk_ids.sizes(), ", got ",
                topk_weights.sizes());
    if (T == 0 || H == 0) return;
    C10_CUDA_CHECK(launch_combine(
        partial.const_data_ptr<float>(), topk_ids.const_data_ptr(), wide,
        topk_weights.const_data_ptr(), float_type(topk_weights, "topk_weights"), out.data_ptr(),
        float_type(out, "out"), static_cast<int>(T), static_cast<int>(topk),
        static_cast<int>(num_experts), static_cast<int>(H), c10::cuda::getCurrentCUDAStream()));
}

// Tokens a block holds: any expert's, up to the widest wgmma this kernel uses.
int block_rows_for(int64_t T) {
    int rows = 8;
    while (rows < T && rows < 64) rows *= 2;
    return rows;
}

void check_weights(const Tensor& hidden, const Tensor& w_gate_up, const Tensor& w_down) {
    for (const Tensor* tensor : {&hidden, &w_gate_up, &w_down}) {
        TORCH_CHECK(tensor->scalar_type() == at::kBFloat16, "the CUDA kernel takes bf16, got ",
                    tensor->scalar_type());
    }
    TORCH_CHECK(hidden.dim() == 2 && hidden.stride(1) == 1 && hidden.stride(0) % 8 == 0,
                "hidden must be [T, H] with rows at multiples of 16 bytes, got strides ",
                hidden.strides());
    const int64_t H = hidden.size(1);
    TORCH_CHECK(w_down.dim() == 3 && w_down.size(1) == H && w_down.is_contiguous(),
                "w_down must be contiguous [E, ", H, ", I], got ", w_down.sizes());
    const int64_t E = w_down.size(0), I = w_down.size(2);
    TORCH_CHECK(w_gate_up.dim() == 3 && w_gate_up.size(0) == E && w_gate_up.size(1) == 2 * I &&
                    w_gate_up.size(2) == H && w_gate_up.is_contiguous(),
                "w_gate_up must be contiguous [", E, ", ", 2 * I, ", ", H, "], got ",
                w_gate_up.sizes());
    TORCH_CHECK(H % kTileK == 0 && I % kTileK == 0, "H and I must be multiples of ", kTileK,
                ", got ", H, " and ", I);
}

void experts(const Tensor& hidden, const Tensor& w_gate_up, const Tensor& w_down,
             const Tensor& topk_ids, const Tensor& topk_weights,
             const std::optional<Tensor>& gate_up_bias, const std::optional<Tensor>& down_bias,
             std::string_view activation, bool gated, bool interleaved, bool transposed,
             std::optional<double> activation_limit, std::optional<double> activation_alpha,
             std::string_view weight_format, std::string_view down_format, bool int8_activations,
             const std::optional<Tensor>& gate_up_scale, const std::optional<Tensor>& down_scale,
             Tensor& out) {
    const c10::cuda::CUDAGuard guard(hidden.device());
    TORCH_CHECK_NOT_IMPLEMENTED(
        activation == "silu" && gated && !interleaved && !transposed && !gate_up_bias &&
            !down_bias && !activation_limit && !activation_alpha && weight_format == "plain" &&
            down_format == "plain" && !int8_activations && !gate_up_scale && !down_scale,
        "the CUDA kernel takes plain silu-gated weights in two halves, without bias or limits");
    check_weights(hidden, w_gate_up, w_down);
    is_int64(topk_ids);
    const int64_t T = hidden.size(0), H = hidden.size(1), E = w_down.size(0), I = w_down.size(2);
    const int64_t topk = topk_ids.size(1), pairs = T * topk;
    TORCH_CHECK(topk_ids.size(0) == T, "topk_ids must be [", T, ", K], got ", topk_ids.sizes());
    if (pairs == 0) {
        out.zero_();
        return;
    }
    const int rows = block_rows_for(T);
    const int bound = max_blocks(static_cast<int>(pairs), static_cast<int>(E), rows);
    const auto integers = topk_ids.options().dtype(at::kInt);
    Tensor sorted_to_pair = at::empty({pairs}, integers), blocks = at::empty({bound, 3}, integers);
    plan(topk_ids, E, rows, sorted_to_pair, blocks);
    const Tensor x_sorted = at::empty({pairs, H}, hidden.options()),
                 act = at::empty({pairs, I}, hidden.options());
    const Tensor partial = at::empty({pairs, H}, hidden.options().dtype(at::kFloat));
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const Plan tables = plan_of(sorted_to_pair, blocks);
    C10_CUDA_CHECK(launch_gather(hidden.const_data_ptr(), hidden.stride(0), tables, bound, rows,
                                 static_cast<int>(topk), static_cast<int>(H), x_sorted.data_ptr(),
                                 stream));
    const Experts call{x_sorted.const_data_ptr(),
                       w_gate_up.const_data_ptr(),
                       w_down.const_data_ptr(),
                       act.data_ptr(),
                       partial.data_ptr<float>(),
                       tables,
                       static_cast<int>(pairs),
                       bound,
                       rows,
                       static_cast<int>(E),
                       static_cast<int>(H),
                       static_cast<int>(I)};
    C10_CUDA_CHECK(launch_experts_sm90(call, stream));
    combine(partial, topk_ids, topk_weights, E, out);
}

static_assert(std::is_same_v<decltype(experts), ExpertsOp>,
              "moesd::experts has one type on every device");

}  // namespace
}  // namespace moesd

TORCH_LIBRARY_IMPL(moesd, CUDA, m) {
    m.impl("plan", moesd::plan);
    m.impl("combine", moesd::combine);
    m.impl("experts", moesd::experts);
}
