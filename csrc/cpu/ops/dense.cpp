// moesd::linear, rms_norm, add_rms_norm, act_and_mul, softmax_topk_router and argmax: the dense ops
// around the experts.
#include <torch/library.h>

#include "ops.h"

namespace moesd {
namespace {

using at::Tensor;

void check_matrix(const Tensor& x, const Tensor& w, const char* shape) {
    TORCH_CHECK_VALUE(x.dim() == 2, "x must be [T, K], got ", x.sizes());
    TORCH_CHECK_VALUE(w.dim() == 2 && w.size(1) == x.size(1), "w must be [", shape, ", ", x.size(1),
                      "], got ", w.sizes());
    TORCH_CHECK_TYPE(w.scalar_type() == x.scalar_type(), "w must be ", x.scalar_type(),
                     " like x, got ", w.scalar_type());
    TORCH_CHECK_VALUE(w.is_contiguous(), "w must be contiguous, got strides ", w.strides());
}

// Norms x, or x + delta, whose sum goes to `sum`.
Tensor normed(const Tensor& x, const Tensor& w, const NormRule& rule, const Tensor* delta,
              Tensor* sum) {
    TORCH_CHECK_VALUE(x.dim() >= 1, "x must be [..., H], got ", x.sizes());
    TORCH_CHECK_VALUE(w.dim() == 1 && w.size(0) == x.size(-1), "w must be [", x.size(-1), "], got ",
                      w.sizes());
    TORCH_CHECK_TYPE(w.scalar_type() == x.scalar_type(), "w must be ", x.scalar_type(),
                     " like x, got ", w.scalar_type());
    const Tensor rows = x.contiguous(), scale = w.contiguous(),
                 added = delta ? delta->contiguous() : Tensor();
    Tensor out = fresh(x.sizes(), x.scalar_type());
    if (out.numel() == 0) return out;
    NormArgs args{};
    args.dtype = storage_dtype(x, "x");
    args.width = x.size(-1), args.rows = x.numel() / args.width;
    args.x = rows.const_data_ptr();
    args.w = scale.const_data_ptr();
    args.rule = rule;
    args.out = out.mutable_data_ptr();
    if (delta) args.delta = added.const_data_ptr(), args.sum = sum->mutable_data_ptr();
    // An element is read, rounded and written more than once.
    args.threads = team_size(x.numel() * 12);
    args.run = run_team;
    kernels().rms_norm(args);
    return out;
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& w, const OptTensor& bias, const OptTensor& scale,
              c10::string_view weight_format, bool int8_activations) {
    if (is_plain(weight_format)) check_matrix(x, w, "N");
    TORCH_CHECK_VALUE(x.dim() == 2, "x must be [T, K], got ", x.sizes());
    TORCH_CHECK_VALUE(w.dim() == 2, "w must be [N, ...], got ", w.sizes());
    const Tensor rows = x.contiguous();
    LinearArgs args{};
    args.dtype = storage_dtype(x, "x");
    args.tokens = x.size(0), args.depth = x.size(1), args.features = w.size(0);
    args.w =
        stored_weights(w, "w", scale, "scale", weight_format, {args.features, args.depth}, x, "x");
    if (bias) {
        TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == args.features, "bias must be [",
                          args.features, "], got ", bias->sizes());
        TORCH_CHECK_TYPE(bias->scalar_type() == x.scalar_type(), "bias must be ", x.scalar_type(),
                         " like x, got ", bias->scalar_type());
    }
    const Tensor offset = bias ? bias->contiguous() : Tensor();
    Tensor out = fresh({args.tokens, args.features}, x.scalar_type());
    if (out.numel() == 0) return out;
    args.x = rows.const_data_ptr();
    args.bias = bias ? offset.const_data_ptr() : nullptr;
    int8_activations = int8_activations && has_integers(args.w.format);
    const bool panels = kernels().panels || int8_activations;
    const int64_t packed = panels ? panel_rows(args.tokens, 1) : args.tokens;
    args.threads = team_size(args.tokens * args.depth * args.features);
    const int64_t floats = packed * packed_floats(args.w, args.depth);
    const int64_t decoded = decoded_elements(args.w, args.threads, args.depth);
    args.packed_x = static_cast<float*>(scratch(floats * sizeof(float) + decoded * sizeof(bf16)));
    args.decoded = reinterpret_cast<bf16*>(args.packed_x + floats);
    args.out = out.mutable_data_ptr();
    args.run = run_team;
    (int8_activations ? kernels().linear_int8 : kernels().linear)(args);
    return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& w, double eps, double offset, bool cast_first) {
    const NormRule rule{static_cast<float>(eps), static_cast<float>(offset), cast_first};
    return normed(x, w, rule, nullptr, nullptr);
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& delta, const Tensor& w,
                                        double eps) {
    TORCH_CHECK_VALUE(delta.sizes() == x.sizes(), "delta must be ", x.sizes(), " like x, got ",
                      delta.sizes());
    TORCH_CHECK_TYPE(delta.scalar_type() == x.scalar_type(), "delta must be ", x.scalar_type(),
                     " like x, got ", delta.scalar_type());
    Tensor sum = fresh(x.sizes(), x.scalar_type());
    Tensor out = normed(x, w, {static_cast<float>(eps)}, &delta, &sum);
    return {sum, out};
}

Tensor act_and_mul(const Tensor& gate, const Tensor& up, c10::string_view activation) {
    TORCH_CHECK_VALUE(up.sizes() == gate.sizes(), "up must be ", gate.sizes(), " like gate, got ",
                      up.sizes());
    TORCH_CHECK_TYPE(up.scalar_type() == gate.scalar_type(), "up must be ", gate.scalar_type(),
                     " like gate, got ", up.scalar_type());
    const Tensor g = gate.contiguous(), u = up.contiguous();
    Tensor out = fresh(gate.sizes(), gate.scalar_type());
    ActArgs args{};
    args.dtype = storage_dtype(gate, "gate");
    args.activation = parse_activation(activation);
    args.elements = out.numel();
    args.gate = g.const_data_ptr(), args.up = u.const_data_ptr();
    args.out = out.mutable_data_ptr();
    args.threads = team_size(args.elements * 8);
    args.run = run_team;
    if (args.elements > 0) kernels().act_and_mul(args);
    return out;
}

std::tuple<Tensor, Tensor, Tensor> softmax_topk_router(const Tensor& x, const Tensor& w,
                                                       int64_t top_k, bool renormalize) {
    check_matrix(x, w, "E");
    TORCH_CHECK_VALUE(w.size(0) <= kMaxExperts, "w must have at most ", kMaxExperts,
                      " experts, got ", w.size(0));
    TORCH_CHECK_VALUE(top_k >= 1 && top_k <= w.size(0), "top_k must be in [1, ", w.size(0),
                      "], got ", top_k);
    Tensor logits = linear(x, w, std::nullopt);
    Tensor weights = fresh({x.size(0), top_k}, at::kFloat);
    Tensor ids = fresh({x.size(0), top_k}, at::kLong);
    RouterArgs args{};
    args.dtype = storage_dtype(x, "x");
    args.tokens = x.size(0);
    args.experts = w.size(0);
    args.top_k = top_k;
    args.renormalize = renormalize;
    args.logits = logits.const_data_ptr();
    args.weights = weights.mutable_data_ptr<float>(), args.ids = ids.mutable_data_ptr<int64_t>();
    args.threads = team_size(args.tokens * args.experts * (top_k + 8) * 8);  // comparisons, mostly
    args.run = run_team;
    kernels().router(args);
    return {logits, weights, ids};
}

std::tuple<Tensor, Tensor> argmax(const Tensor& x) {
    TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) > 0, "x must be [..., V] with V > 0, got ",
                      x.sizes());
    const Tensor rows = x.contiguous();
    const at::IntArrayRef sizes = x.sizes().slice(0, x.dim() - 1);
    Tensor ids = fresh(sizes, at::kLong), undefined = fresh(sizes, at::kBool);
    ArgmaxArgs args{};
    args.dtype = storage_dtype(x, "x");
    args.width = x.size(-1), args.rows = x.numel() / args.width;
    args.x = rows.const_data_ptr();
    args.ids = ids.mutable_data_ptr<int64_t>(), args.undefined = undefined.mutable_data_ptr<bool>();
    args.threads = team_size(x.numel());
    args.run = run_team;
    if (args.rows > 0) kernels().argmax(args);
    return {ids, undefined};
}

TORCH_LIBRARY_IMPL(moesd, CPU, m) {
    m.impl("linear", &linear);
    m.impl("rms_norm", &rms_norm);
    m.impl("add_rms_norm", &add_rms_norm);
    m.impl("act_and_mul", &act_and_mul);
    m.impl("softmax_topk_router", &softmax_topk_router);
    m.impl("argmax", &argmax);
}

}  // namespace moesd
