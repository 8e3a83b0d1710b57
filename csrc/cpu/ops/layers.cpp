// moesd::LayerStack: the decoder layers of a Llama-shaped model, walked without the interpreter
// between their ops, and its greedy continuation, without the interpreter between its steps.
#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/ops/full.h>
#include <torch/custom_class.h>

#include "layer.h"
#include "places.h"

namespace moesd {
namespace {

using at::Tensor;

class LayerStack : public torch::CustomClassHolder {
public:
    // Appends a layer: its attention, the norm after it and the norm that follows the layer. The
    // four epsilons come in the order that their argument's name gives.
    void add_layer(Tensor qkv, OptTensor qkv_bias, OptTensor q_norm, OptTensor k_norm, Tensor out,
                   OptTensor out_bias, Tensor post_norm, Tensor following_norm,
                   const std::vector<double>& q_k_post_following_eps, double scale, int64_t window,
                   int64_t q_heads, int64_t kv_heads) {
        TORCH_CHECK_VALUE(q_k_post_following_eps.size() == 4, "expected four epsilons, got ",
                          q_k_post_following_eps.size());
        const auto& eps = q_k_post_following_eps;
        layers_.push_back({{qkv},
                           qkv_bias,
                           q_norm,
                           k_norm,
                           out_bias,
                           {out},
                           post_norm,
                           following_norm,
                           eps[0],
                           eps[1],
                           eps[2],
                           eps[3],
                           scale,
                           window,
                           q_heads,
                           kv_heads,
                           std::nullopt,
                           std::nullopt});
    }

    // The MLP of the layer added last; a layer without one is left to the caller (see `run`).
    void set_mlp(Tensor gate, OptTensor gate_bias, Tensor up, OptTensor up_bias, Tensor down,
                 OptTensor down_bias, std::string activation) {
        last().mlp =
            Mlp{{gate}, {up}, {down}, gate_bias, up_bias, down_bias, std::move(activation)};
    }
    void set_moe(Tensor router, int64_t top_k, bool renormalize, bool cast, Tensor gate_up,
                 Tensor down, std::string activation) {
        last().moe =
            Moe{router, top_k, renormalize, cast, {gate_up}, {down}, std::move(activation)};
    }
    // How a weight of the layer added last is stored: "qkv", "out", of its MLP "gate", "up" or
    // "down", of its experts "gate_up" or "down". Or the "head", whose data continue_greedily is
    // given. Experts round their activations where `gate_up` says so.
    void set_format(const std::string& weight, OptTensor scale, std::string format,
                    bool int8_activations) {
        Weight& stored = weight_named(weight);
        stored.scale = std::move(scale), stored.format = std::move(format);
        stored.int8_activations = int8_activations;
    }

    // Runs layers from `first` up to `stop` (exclusive), or up to and including the attention half
    // of the first layer whose MLP the caller runs: one that was given none, or any unless `mlps`.
    //
    // x and states [T, H]: the residual stream, and the same after the norm before layer `first`.
    // cos, sin [T, D]; index [T] where keys and values are written; positions [B, Q] and rows [B]
    // as of ragged_attention; keys, values: each layer's slab [rows, S, Hkv, D]; columns [B, n]: of
    // each sequence's Q tokens, those that are wanted after the last layer, which computes no
    // others. Returns the stream, the same after the norm of the part that comes next, and the
    // layer reached.
    std::tuple<Tensor, Tensor, int64_t> run(Tensor x, Tensor states, const Tensor& cos,
                                            const Tensor& sin, const Tensor& index,
                                            const Tensor& positions, const OptTensor& rows,
                                            const std::vector<Tensor>& keys,
                                            const std::vector<Tensor>& values, int64_t first,
                                            int64_t stop, bool mlps,
                                            const OptTensor& columns) const {
        const auto count = static_cast<int64_t>(layers_.size());
        TORCH_CHECK_VALUE(0 <= first && first <= stop && stop <= count,
                          "expected 0 <= first <= stop <= ", count, ", got ", first, " and ", stop);
        TORCH_CHECK_VALUE(
            static_cast<int64_t>(keys.size()) == count && keys.size() == values.size(), "expected ",
            count, " slabs of keys and of values, got ", keys.size(), " and ", values.size());
        TORCH_CHECK_VALUE(positions.dim() == 2, "positions must be [B, Q], got ",
                          positions.sizes());
        for (int64_t i = first; i < stop; ++i) {
            const Layer& layer = layers_[i];
            OptTensor wanted;
            if (columns && i + 1 == count) {
                wanted = flat_index(*columns, positions.size(0), positions.size(1));
            }
            const Tensor attended =
                attend(layer, states, cos, sin, index, positions, rows, keys[i], values[i], wanted);
            if (wanted) x = rows_of(x, *wanted);
            const Tensor projected = scoped_linear(attended, layer.out, layer.out_bias);
            std::tie(x, states) = add_norm(x, projected, layer.post_norm, layer.post_eps);
            if (!mlps || !(layer.mlp || layer.moe)) return {x, states, i};
            const Tensor delta =
                layer.mlp ? run_mlp(*layer.mlp, states) : run_moe(*layer.moe, states);
            std::tie(x, states) = add_norm(x, delta, layer.following_norm, layer.following_eps);
        }
        return {x, states, stop};
    }

    // The `count` >= 1 tokens that follow each row greedily, [B, count], and where no token was the
    // largest, [B, count].
    //
    // ids and positions [B, W]: the newest tokens of every row, the latest in the last column; -1
    // is padding, which goes to its row's last position. embedding [V, H]; norm, eps: before the
    // first layer; head [V, H]; cos, sin [S, D] by position; rows, keys, values as of `run`. Every
    // layer must have its MLP.
    std::tuple<Tensor, Tensor> continue_greedily(
        const Tensor& ids, const Tensor& positions, const Tensor& rows, const Tensor& embedding,
        const Tensor& norm, double eps, const Tensor& head, const Tensor& cos, const Tensor& sin,
        const std::vector<Tensor>& keys, const std::vector<Tensor>& values, int64_t count) const {
        TORCH_CHECK_VALUE(ids.dim() == 2 && ids.size(1) > 0 && ids.sizes() == positions.sizes() &&
                              rows.numel() == ids.size(0),
                          "expected ids and positions [B, W > 0] and rows [B], got ", ids.sizes(),
                          ", ", positions.sizes(), " and ", rows.sizes());
        TORCH_CHECK_VALUE(!keys.empty(), "expected the slabs of at least one layer, got none");
        const int64_t batch = ids.size(0);
        Tensor tokens = fresh({batch, count}, at::kLong);
        Tensor undefined = fresh({batch, count}, at::kBool);
        const Tensor all_ids = ids.contiguous(), all_positions = positions.contiguous();
        int64_t* token = tokens.mutable_data_ptr<int64_t>();
        bool* no_largest = undefined.mutable_data_ptr<bool>();
        const auto run_rows = [&](int64_t start, int64_t end) {
            const Tensor cache_rows = rows.slice(0, start, end);
            Tensor step_ids = all_ids.slice(0, start, end);
            Tensor step_positions = all_positions.slice(0, start, end);
            for (int64_t step = 0; step < count; ++step) {
                const auto [best, none] =
                    argmax(forward(step_ids, step_positions, cache_rows, embedding, norm, eps, head,
                                   cos, sin, keys, values));
                for (int64_t b = start; b < end; ++b) {
                    token[b * count + step] = best.const_data_ptr<int64_t>()[b - start];
                    no_largest[b * count + step] = none.const_data_ptr<bool>()[b - start];
                }
                step_ids = best.view({-1, 1}), step_positions = next_positions(step_positions);
            }
        };
        // Rows are independent, so each thread can take some of them through all the steps alone.
        // It then reads all the weights, which pays while they stay in its cache.
        if (weight_bytes() + head.nbytes() > kCachedBytes) {
            run_rows(0, batch);
        } else {
            const at::ThreadLocalState state;
            at::parallel_for(0, batch, (batch + max_threads() - 1) / max_threads(),
                             [&](int64_t start, int64_t end) {
                                 const at::ThreadLocalStateGuard guard(state);
                                 run_rows(start, end);
                             });
        }
        return {tokens, undefined};
    }

private:
    // Weights that stay in a core's cache.
    static constexpr size_t kCachedBytes = 4 << 20;

    // Logits [B, V] of the last column; the arguments as of continue_greedily.
    Tensor forward(const Tensor& ids, const Tensor& positions, const Tensor& rows,
                   const Tensor& embedding, const Tensor& norm, double eps, const Tensor& head,
                   const Tensor& cos, const Tensor& sin, const std::vector<Tensor>& keys,
                   const std::vector<Tensor>& values) const {
        const auto depth = static_cast<int64_t>(layers_.size());
        const auto [index, angles] = cache_places(positions, rows, keys[0].size(1));
        const Tensor x = rows_of(embedding, ids);
        OptTensor latest;  // all there are, from the second step on
        if (ids.size(1) > 1) latest = at::full({ids.size(0), 1}, ids.size(1) - 1, ids.options());
        const auto [stream, normed, reached] =
            run(x, rms_norm(x, norm, eps), rows_of(cos, angles), rows_of(sin, angles), index,
                positions, rows, keys, values, 0, depth, true, latest);
        TORCH_CHECK_VALUE(reached == depth, "expected an MLP in every layer, got none in layer ",
                          reached);
        Weight weight = head_;
        weight.data = head;
        return scoped_linear(normed, weight, std::nullopt);
    }

    size_t weight_bytes() const {
        size_t bytes = 0;
        for (const Layer& layer : layers_) {
            bytes += layer.qkv.nbytes() + layer.out.nbytes();
            if (layer.mlp) {
                bytes +=
                    layer.mlp->gate.nbytes() + layer.mlp->up.nbytes() + layer.mlp->down.nbytes();
            }
            if (layer.moe) bytes += layer.moe->gate_up.nbytes() + layer.moe->down.nbytes();
        }
        return bytes;
    }

    Weight& weight_named(const std::string& name) {
        if (name == "head") return head_;
        Layer& layer = last();
        if (name == "qkv") return layer.qkv;
        if (name == "out") return layer.out;
        if (layer.mlp && name == "gate") return layer.mlp->gate;
        if (layer.mlp && name == "up") return layer.mlp->up;
        if (layer.mlp && name == "down") return layer.mlp->down;
        if (layer.moe && name == "gate_up") return layer.moe->gate_up;
        if (layer.moe && name == "down") return layer.moe->down;
        TORCH_CHECK_VALUE(false, "expected a weight of the layer added last, got ", name);
    }

    Layer& last() {
        TORCH_CHECK_VALUE(!layers_.empty(), "expected a layer to have been added, got none");
        return layers_.back();
    }

    static std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const Tensor& delta,
                                               const Tensor& w, double eps) {
        return scoped("moesd::add_rms_norm", [&] { return add_rms_norm(x, delta, w, eps); });
    }

    static Tensor attend(const Layer& layer, const Tensor& states, const Tensor& cos,
                         const Tensor& sin, const Tensor& index, const Tensor& positions,
                         const OptTensor& rows, const Tensor& keys, const Tensor& values,
                         const OptTensor& wanted) {
        const Tensor qkv = scoped_linear(states, layer.qkv, layer.qkv_bias);
        const int64_t head_dim = cos.size(-1), width = layer.kv_heads * head_dim;
        Tensor flat_keys = keys.view({-1, width}), flat_values = values.view({-1, width});
        Tensor queries = scoped("moesd::rope_to_cache", [&] {
            return rope_to_cache(qkv, cos, sin, layer.q_norm, layer.q_eps, layer.k_norm,
                                 layer.k_eps, index, layer.q_heads, layer.kv_heads, flat_keys,
                                 flat_values);
        });
        Tensor query_positions = positions;
        if (wanted) {
            queries = rows_of(queries.flatten(1), *wanted);
            query_positions = rows_of(positions.reshape({-1, 1}), *wanted).view(wanted->sizes());
        }
        const Tensor q = queries.view(
            {query_positions.size(0), query_positions.size(1), layer.q_heads, head_dim});
        const Tensor attended = scoped("moesd::ragged_attention", [&] {
            return ragged_attention(q, keys, values, query_positions, layer.scale, layer.window,
                                    std::nullopt, rows);
        });
        return attended.view({query_positions.numel(), layer.q_heads * head_dim});
    }

    std::vector<Layer> layers_;
    Weight head_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(moesd, m) {
    m.class_<LayerStack>("LayerStack")
        .def(torch::init<>())
        .def("add_layer", &LayerStack::add_layer)
        .def("set_mlp", &LayerStack::set_mlp)
        .def("set_moe", &LayerStack::set_moe)
        .def("set_format", &LayerStack::set_format)
        .def("run", &LayerStack::run)
        .def("continue_greedily", &LayerStack::continue_greedily);
}

}  // namespace moesd
