// What the op boundary files share: the chosen kernels, dtype names, scratch memory, the thread
// team, and the ops themselves as functions (register.cpp says what they do).
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../../experts_op.h"
#include "../types.h"

namespace moesd {

// The best table this processor runs, or the one MOESD_CPU_ISA names; decided at the first call.
const KernelTable& kernels();

// Raises TypeError-like errors naming `what` for dtypes the kernels do not store.
DType storage_dtype(const at::Tensor& t, const char* what);

// Raises ValueError or TypeError unless t is contiguous, of these sizes, and of the dtype of
// `like`; names both.
void check_like(const at::Tensor& t, const char* name, at::IntArrayRef sizes,
                const at::Tensor& like, const char* like_name);

// Raises ValueError for names the kernels do not know.
Activation parse_activation(c10::string_view name);

using OptTensor = std::optional<at::Tensor>;

// The weights of these sizes ([..., R, C], C the depth of the products) that lie in w and scale.
// Raises ValueError for unknown formats, and ValueError or TypeError, with the names of the
// tensors, where these are not the format's; plain weights have the dtype of `like`.
StoredWeights stored_weights(const at::Tensor& w, const char* name, const OptTensor& scale,
                             const char* scale_name, c10::string_view format,
                             std::vector<int64_t> sizes, const at::Tensor& like,
                             const char* like_name);
bool is_plain(c10::string_view format);
// Whether weights of a format are integers with one scale for each of its runs: activations of
// eight bits are for such weights; with others, activations stay as they are.
bool has_integers(WeightFormat format);

// Elements of scratch in which a team holds decoded weights, where kernels compute in tiles.
inline int64_t decoded_elements(const StoredWeights& w, int threads, int64_t depth) {
    const bool needed = kernels().panels && w.format != WeightFormat::kPlain;
    return needed ? threads * decoded_size(depth) : 0;
}

// An uninitialised tensor. at::empty takes as long to find its kernel as some of these ops take.
inline at::Tensor fresh(at::IntArrayRef sizes, at::ScalarType dtype) {
    return at::Tensor(at::detail::empty_cpu(sizes, dtype));
}

// Grow-only memory of the calling thread, valid until its next call.
void* scratch(size_t bytes);

// torch.get_num_threads(), or the number of cores where those are fewer.
int max_threads();

// Threads worth waking for this many multiply-adds, at most max_threads().
int team_size(int64_t multiply_adds);

void run_team(int threads, void (*body)(void*), void* ctx);

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& w, double eps, double offset = 0,
                    bool cast_first = true);
std::tuple<at::Tensor, at::Tensor> argmax(const at::Tensor& x);
at::Tensor linear(const at::Tensor& x, const at::Tensor& w, const OptTensor& bias,
                  const OptTensor& scale = std::nullopt, c10::string_view weight_format = "plain",
                  bool int8_activations = false);
std::tuple<at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& delta,
                                                const at::Tensor& w, double eps);
at::Tensor act_and_mul(const at::Tensor& gate, const at::Tensor& up, c10::string_view activation);
std::tuple<at::Tensor, at::Tensor, at::Tensor> softmax_topk_router(const at::Tensor& x,
                                                                   const at::Tensor& w,
                                                                   int64_t top_k, bool renormalize);
at::Tensor rope_to_cache(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin,
                         const OptTensor& q_norm, double q_eps, const OptTensor& k_norm,
                         double k_eps, const at::Tensor& index, int64_t q_heads, int64_t kv_heads,
                         at::Tensor& keys, at::Tensor& values);
at::Tensor ragged_attention(const at::Tensor& query, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& positions, double scale, int64_t window,
                            const OptTensor& sinks, const OptTensor& rows);
ExpertsOp experts;

}  // namespace moesd
