// The only place where op schemas are written, those of CUDA's ops included. (a!) marks what an op
// mutates. The methods of a class have no schema to write: torch derives it from their C++ types,
// so moesd::LayerStack is registered where it is defined (cpu/ops/layers.cpp).
#include <torch/library.h>

// What moesd::experts computes from, and how; ExpertsOp (experts_op.h) is the same in C++.
// `weight_format` is that of w_gate_up.
#define MOESD_EXPERTS                                                                         \
    "Tensor hidden, Tensor w_gate_up, Tensor w_down, Tensor topk_ids, Tensor topk_weights, "  \
    "Tensor? gate_up_bias, Tensor? down_bias, str activation, bool gated, bool interleaved, " \
    "bool transposed, float? activation_limit, float? activation_alpha, str weight_format, "  \
    "str down_format, bool int8_activations, Tensor? gate_up_scale, Tensor? down_scale"

TORCH_LIBRARY(moesd, m) {
    m.def("experts(" MOESD_EXPERTS ", Tensor(a!) out) -> ()");
    m.def("try_experts(" MOESD_EXPERTS ") -> Tensor?");
    m.def(
        "linear(Tensor x, Tensor w, Tensor? bias, Tensor? scale=None, "
        "str weight_format=\"plain\", bool int8_activations=False) -> Tensor");
    m.def(
        "ragged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor positions, float scale, "
        "int window, Tensor? sinks, Tensor? rows) -> Tensor");
    m.def("act_and_mul(Tensor gate, Tensor up, str activation) -> Tensor");
    m.def(
        "rms_norm(Tensor x, Tensor w, float eps, float offset=0.0, bool cast_first=True) "
        "-> Tensor");
    m.def(
        "add_rms_norm(Tensor x, Tensor delta, Tensor w, float eps) -> (Tensor sum, Tensor normed)");
    m.def(
        "rope_to_cache(Tensor qkv, Tensor cos, Tensor sin, Tensor? q_norm, float q_eps, "
        "Tensor? k_norm, float k_eps, Tensor index, int q_heads, int kv_heads, Tensor(a!) keys, "
        "Tensor(b!) values) -> Tensor");
    m.def(
        "softmax_topk_router(Tensor x, Tensor w, int top_k, bool renormalize) "
        "-> (Tensor logits, Tensor weights, Tensor ids)");
    m.def("argmax(Tensor x) -> (Tensor ids, Tensor undefined)");
    m.def("race(Tensor probs, Tensor keys) -> Tensor");
    // Recurrent layers.
    m.def(
        "gated_delta_rule(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, "
        "Tensor(a!) states, Tensor rows, Tensor keep, Tensor counts) -> Tensor");
    m.def(
        "selective_state_update(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, "
        "Tensor(a!) states, Tensor rows, Tensor keep, Tensor counts) -> Tensor");
    m.def(
        "selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, "
        "Tensor(a!) states, Tensor rows, Tensor keep, Tensor counts) -> Tensor");
    m.def(
        "short_convolution(Tensor window, Tensor weight, Tensor? bias=None, "
        "str? activation=None) -> Tensor");
    m.def(
        "gated_rms_norm(Tensor x, Tensor gate, Tensor w, float eps, int group, bool gate_first, "
        "bool cast_first, str activation) -> Tensor");
    m.def("cpu_isa() -> str");
    m.def("activation_names() -> str[]");
    m.def("weight_format_names() -> str[]");
    // Kernels on CUDA only.
    m.def(
        "plan(Tensor topk_ids, int num_experts, int block_m, Tensor(a!) sorted_to_pair, "
        "Tensor(b!) blocks) -> ()");
    m.def(
        "combine(Tensor partial, Tensor topk_ids, Tensor topk_weights, int num_experts, "
        "Tensor(a!) out) -> ()");
}
