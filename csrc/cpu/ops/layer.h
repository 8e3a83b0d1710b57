// A decoder layer of moesd::LayerStack: its weights, and its MLP.
#pragma once

#include <ATen/record_function.h>

#include <string>

#include "ops.h"

namespace moesd {

// A weight as it is stored: plain until `set_format` says otherwise.
struct Weight {
    at::Tensor data;
    OptTensor scale = std::nullopt;
    std::string format = "plain";
    bool int8_activations = false;

    size_t nbytes() const { return data.nbytes() + (scale ? scale->nbytes() : 0); }
};

struct Mlp {
    Weight gate, up, down;  // [I, H], [I, H], [H, I]
    OptTensor gate_bias, up_bias, down_bias;
    std::string activation;
};

struct Moe {
    at::Tensor router;  // [E, H]
    int64_t top_k;
    bool renormalize, cast;
    Weight gate_up, down;  // [E, 2I, H], [E, H, I]
    std::string activation;
};

struct Layer {
    Weight qkv;  // [(Hq + 2 Hkv) * D, H]
    OptTensor qkv_bias, q_norm, k_norm, out_bias;
    Weight out;
    at::Tensor post_norm, following_norm;
    double q_eps, k_eps, post_eps, following_eps, scale;
    int64_t window, q_heads, kv_heads;
    std::optional<Mlp> mlp;
    std::optional<Moe> moe;
};

// f() as a scope of the profiler, as the op of that name is when it is called by itself.
template <class F>
auto scoped(const char* name, const F& f) {
    RECORD_FUNCTION(name, {});
    return f();
}

inline at::Tensor scoped_linear(const at::Tensor& x, const Weight& w, const OptTensor& bias) {
    return scoped("moesd::linear",
                  [&] { return linear(x, w.data, bias, w.scale, w.format, w.int8_activations); });
}

inline at::Tensor run_mlp(const Mlp& m, const at::Tensor& x) {
    const at::Tensor gate = scoped_linear(x, m.gate, m.gate_bias);
    const at::Tensor up = scoped_linear(x, m.up, m.up_bias);
    const at::Tensor inner =
        scoped("moesd::act_and_mul", [&] { return act_and_mul(gate, up, m.activation); });
    return scoped_linear(inner, m.down, m.down_bias);
}

inline at::Tensor run_moe(const Moe& m, const at::Tensor& x) {
    auto [logits, weights, ids] = scoped("moesd::softmax_topk_router", [&] {
        return softmax_topk_router(x, m.router, m.top_k, m.renormalize);
    });
    if (m.cast) weights = weights.to(x.scalar_type());
    at::Tensor out = fresh(x.sizes(), x.scalar_type());
    scoped("moesd::experts", [&] {
        experts(x, m.gate_up.data, m.down.data, ids, weights, std::nullopt, std::nullopt,
                m.activation, true, false, false, std::nullopt, std::nullopt, m.gate_up.format,
                m.down.format, m.gate_up.int8_activations, m.gate_up.scale, m.down.scale, out);
    });
    return out;
}

}  // namespace moesd
