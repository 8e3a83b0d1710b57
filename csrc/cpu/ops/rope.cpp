// moesd::rope_to_cache: checks, among them that every index lies inside the cache.
#include <torch/library.h>

#include "ops.h"

namespace moesd {
namespace {

using at::Tensor;

const void* checked_norm(const OptTensor& norm, const Tensor& qkv, int64_t head_dim,
                         const char* name) {
    if (!norm) return nullptr;
    check_like(*norm, name, {head_dim}, qkv, "qkv");
    return norm->const_data_ptr();
}

}  // namespace

Tensor rope_to_cache(const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                     const OptTensor& q_norm, double q_eps, const OptTensor& k_norm, double k_eps,
                     const Tensor& index, int64_t q_heads, int64_t kv_heads, Tensor& keys,
                     Tensor& values) {
    TORCH_CHECK_VALUE(q_heads > 0 && kv_heads > 0, "heads must be positive, got ", q_heads, " and ",
                      kv_heads);
    TORCH_CHECK_VALUE(cos.dim() == 2, "cos must be [T, D], got ", cos.sizes());
    const int64_t tokens = cos.size(0), head_dim = cos.size(1);
    TORCH_CHECK_VALUE(head_dim % 2 == 0 && head_dim <= kMaxHeadDim,
                      "the head dimension must be even and at most ", kMaxHeadDim, ", got ",
                      head_dim);
    TORCH_CHECK_VALUE(keys.dim() == 2, "keys must be [rows, Hkv * D], got ", keys.sizes());
    check_like(qkv, "qkv", {tokens, (q_heads + 2 * kv_heads) * head_dim}, qkv, "qkv");
    check_like(cos, "cos", {tokens, head_dim}, qkv, "qkv");
    check_like(sin, "sin", {tokens, head_dim}, qkv, "qkv");
    check_like(keys, "keys", {keys.size(0), kv_heads * head_dim}, qkv, "qkv");
    check_like(values, "values", keys.sizes(), qkv, "qkv");
    TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "index must be int64, got ",
                     index.scalar_type());
    check_like(index, "index", {tokens}, index, "index");
    RopeArgs args{};
    args.index = index.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < tokens; ++t) {
        TORCH_CHECK_INDEX(args.index[t] >= 0 && args.index[t] < keys.size(0),
                          "index must be in [0, ", keys.size(0), "), got ", args.index[t]);
    }
    Tensor q = fresh({tokens, q_heads, head_dim}, qkv.scalar_type());
    args.dtype = storage_dtype(qkv, "qkv");
    args.tokens = tokens;
    args.q_heads = q_heads;
    args.kv_heads = kv_heads;
    args.head_dim = head_dim;
    args.qkv = qkv.const_data_ptr();
    args.cos = cos.const_data_ptr();
    args.sin = sin.const_data_ptr();
    args.q_norm = checked_norm(q_norm, qkv, head_dim, "q_norm");
    args.q_eps = static_cast<float>(q_eps);
    args.k_norm = checked_norm(k_norm, qkv, head_dim, "k_norm");
    args.k_eps = static_cast<float>(k_eps);
    args.keys = keys.mutable_data_ptr();
    args.values = values.mutable_data_ptr();
    args.q = q.mutable_data_ptr();
    args.threads = team_size(qkv.numel() * 16);  // five roundings an element
    args.run = run_team;
    if (tokens > 0) kernels().rope_to_cache(args);
    return q;
}

TORCH_LIBRARY_IMPL(moesd, CPU, m) { m.impl("rope_to_cache", &rope_to_cache); }

}  // namespace moesd
