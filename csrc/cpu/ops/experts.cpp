// moesd::experts: checks, the routing plan (a stable counting sort of the routed rows by expert),
// scratch.
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <thread>

#include "ops.h"

namespace moesd {
namespace {

using at::Tensor;

// The phases of one call as profiler scopes on the calling thread.
class PhaseScopes {
public:
    // Whether anybody listens; otherwise the kernels are not to report phases at all.
    const bool active = at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE).has_value();

    // Ends the phase before; only the caller records, though the whole team enters.
    void enter(const char* name) {
        if (!active || std::this_thread::get_id() != caller_) return;
        scope_.reset();
        scope_.emplace(at::RecordScope::USER_SCOPE);
        scope_->before(name);
    }

private:
    const std::thread::id caller_ = std::this_thread::get_id();
    std::optional<at::RecordFunction> scope_;
};

// The layer's sizes, weights and biases.
struct Weights {
    int64_t experts, inter;
    StoredWeights gate_up, down;
    OptTensor gate_up_bias, down_bias;  // contiguous

    bool have_integers() const { return has_integers(gate_up.format) && has_integers(down.format); }
};

// Enough for either: a matrix is not decoded before the other is done with.
int64_t decoded_elements(const Weights& w, int threads, int64_t depth) {
    return std::max(decoded_elements(w.gate_up, threads, depth),
                    decoded_elements(w.down, threads, depth));
}

// Copied where it is not contiguous: a bias is small beside its weights.
OptTensor checked_bias(const OptTensor& bias, const char* name, at::IntArrayRef sizes,
                       const Tensor& hidden) {
    if (!bias) return std::nullopt;
    const Tensor rows = bias->contiguous();
    check_like(rows, name, sizes, hidden, "hidden");
    return rows;
}

Weights checked_weights(const Tensor& hidden, const Tensor& w_gate_up, const Tensor& w_down,
                        const OptTensor& gate_up_bias, const OptTensor& down_bias, bool gated,
                        bool transposed, c10::string_view format, c10::string_view down_format,
                        const OptTensor& gate_up_scale, const OptTensor& down_scale,
                        const Tensor& out) {
    TORCH_CHECK_VALUE(hidden.dim() == 2, "hidden must be [T, H], got ", hidden.sizes());
    TORCH_CHECK_VALUE(w_down.dim() == 3, "w_down must be [E, H, I], got ", w_down.sizes());
    TORCH_CHECK_VALUE(!transposed || (is_plain(format) && is_plain(down_format)),
                      "transposed=True needs plain weights, got the formats ", format, " and ",
                      down_format);
    TORCH_CHECK_VALUE(w_gate_up.dim() == 3, "w_gate_up must be [E, ", gated ? "2I" : "I",
                      ", ...], got ", w_gate_up.sizes());
    const int64_t hidden_size = hidden.size(1), experts = w_down.size(0);
    // A row of w_down has the size of its format.
    const int64_t inter = is_plain(down_format) ? w_down.size(transposed ? 1 : 2)
                                                : w_gate_up.size(1) / (gated ? 2 : 1);
    const int64_t up_rows = gated ? 2 * inter : inter;
    const auto sizes = [&](int64_t rows, int64_t depth) {
        return transposed ? std::vector<int64_t>{experts, depth, rows}
                          : std::vector<int64_t>{experts, rows, depth};
    };
    const Weights weights{experts,
                          inter,
                          stored_weights(w_gate_up, "w_gate_up", gate_up_scale, "gate_up_scale",
                                         format, sizes(up_rows, hidden_size), hidden, "hidden"),
                          stored_weights(w_down, "w_down", down_scale, "down_scale", down_format,
                                         sizes(hidden_size, inter), hidden, "hidden"),
                          checked_bias(gate_up_bias, "gate_up_bias", {experts, up_rows}, hidden),
                          checked_bias(down_bias, "down_bias", {experts, hidden_size}, hidden)};
    check_like(out, "out", hidden.sizes(), hidden, "hidden");
    return weights;
}

void check_routing(const Tensor& topk_ids, const Tensor& topk_weights, int64_t tokens) {
    TORCH_CHECK_VALUE(topk_ids.dim() == 2 && topk_ids.size(0) == tokens, "topk_ids must be [",
                      tokens, ", K], got ", topk_ids.sizes());
    TORCH_CHECK_VALUE(topk_weights.sizes() == topk_ids.sizes(), "topk_weights must be ",
                      topk_ids.sizes(), ", got ", topk_weights.sizes());
    TORCH_CHECK_TYPE(topk_ids.scalar_type() == at::kLong || topk_ids.scalar_type() == at::kInt,
                     "topk_ids must be int32 or int64, got ", topk_ids.scalar_type());
}

// The plan's arrays, filled from topk_ids and topk_weights.
struct Plan {
    int64_t *active, *offsets, *sorted_token;
    float* sorted_weight;
    int64_t num_active = 0;

    static size_t bytes(int64_t experts, int64_t rows) {
        return (2 * experts + 1 + rows) * 8 + rows * 4 + 64;
    }

    Plan(void* memory, int64_t experts, int64_t rows) {
        active = static_cast<int64_t*>(memory);
        offsets = active + experts;
        sorted_token = offsets + experts + 1;
        sorted_weight = reinterpret_cast<float*>(sorted_token + rows);
    }

    template <class Id, class Weight>
    void fill(const Tensor& ids, const Tensor& weights, int64_t experts, int64_t* cursor) {
        const auto id = ids.accessor<Id, 2>();
        const auto weight = weights.accessor<Weight, 2>();
        std::fill(cursor, cursor + experts, 0);
        for (int64_t t = 0; t < id.size(0); ++t) {
            for (int64_t k = 0; k < id.size(1); ++k) {
                if (id[t][k] >= 0 && id[t][k] < experts) ++cursor[id[t][k]];
            }
        }
        int64_t rows = 0;
        for (int64_t e = 0; e < experts; ++e) {
            const int64_t count = cursor[e];
            cursor[e] = rows;
            if (count == 0) continue;
            active[num_active] = e, offsets[num_active] = rows;
            ++num_active, rows += count;
        }
        offsets[num_active] = rows;
        for (int64_t t = 0; t < id.size(0); ++t) {
            for (int64_t k = 0; k < id.size(1); ++k) {
                if (id[t][k] < 0 || id[t][k] >= experts) continue;
                const int64_t row = cursor[id[t][k]]++;
                sorted_token[row] = t, sorted_weight[row] = static_cast<float>(weight[t][k]);
            }
        }
    }

    void fill(const Tensor& ids, const Tensor& weights, int64_t experts, int64_t* cursor) {
        if (ids.scalar_type() == at::kLong) fill<int64_t>(ids, weights, experts, cursor);
        else fill<int32_t>(ids, weights, experts, cursor);
    }

    template <class Id>
    void fill(const Tensor& ids, const Tensor& weights, int64_t experts, int64_t* cursor) {
        switch (weights.scalar_type()) {
            case at::kFloat: return fill<Id, float>(ids, weights, experts, cursor);
            case at::kDouble: return fill<Id, double>(ids, weights, experts, cursor);
            case at::kBFloat16: return fill<Id, at::BFloat16>(ids, weights, experts, cursor);
            case at::kHalf: return fill<Id, at::Half>(ids, weights, experts, cursor);
            default:
                TORCH_CHECK_TYPE(false, "topk_weights must be floating, got ",
                                 weights.scalar_type());
        }
    }
};

}  // namespace

void experts(const Tensor& hidden, const Tensor& w_gate_up, const Tensor& w_down,
             const Tensor& topk_ids, const Tensor& topk_weights, const OptTensor& gate_up_bias,
             const OptTensor& down_bias, c10::string_view activation, bool gated, bool interleaved,
             bool transposed, std::optional<double> limit, std::optional<double> alpha,
             c10::string_view weight_format, c10::string_view down_format, bool int8_activations,
             const OptTensor& gate_up_scale, const OptTensor& down_scale, Tensor& out) {
    const Weights weights =
        checked_weights(hidden, w_gate_up, w_down, gate_up_bias, down_bias, gated, transposed,
                        weight_format, down_format, gate_up_scale, down_scale, out);
    const int64_t tokens = hidden.size(0), hidden_size = hidden.size(1);
    const int64_t experts = weights.experts, inter = weights.inter;
    check_routing(topk_ids, topk_weights, tokens);
    TORCH_CHECK_VALUE(gated || !(interleaved || limit || alpha),
                      "interleaved, activation_limit and activation_alpha need gated=True");

    PhaseScopes phases;
    phases.enter("moesd::plan");
    const Tensor x = hidden.contiguous();
    const int64_t rows = topk_ids.numel(), in_panels = panel_rows(rows, experts);
    int8_activations = int8_activations && weights.have_integers();
    const bool panels = kernels().panels || int8_activations;
    const int64_t packed_x =
        (panels ? in_panels : tokens) * packed_floats(weights.gate_up, hidden_size);
    const int64_t packed_act = (panels ? in_panels : rows) * packed_floats(weights.down, inter);
    const int64_t acc = (tokens * hidden_size + 15) / 16 * 16;
    const int threads = team_size(rows * inter * hidden_size * (gated ? 3 : 2));
    const int64_t decoded = decoded_elements(weights, threads, std::max(hidden_size, inter));
    const size_t floats = packed_x + packed_act + acc + decoded / 2;
    const size_t bytes = floats * 4 + Plan::bytes(experts, rows) + experts * 8;
    auto* memory = static_cast<float*>(scratch(bytes));
    auto* cursor = reinterpret_cast<int64_t*>(memory + floats);
    Plan plan(cursor + experts, experts, rows);
    plan.fill(topk_ids, topk_weights, experts, cursor);

    ExpertsArgs args{};
    args.threads = threads, args.run = run_team;
    args.dtype = storage_dtype(hidden, "hidden"), args.activation = parse_activation(activation);
    args.gated = gated, args.interleaved = interleaved, args.transposed = transposed;
    args.has_limit = limit.has_value(), args.limit = static_cast<float>(limit.value_or(0));
    args.has_alpha = alpha.has_value(), args.alpha = static_cast<float>(alpha.value_or(0));
    args.tokens = tokens, args.hidden = hidden_size, args.inter = inter;
    args.num_active = plan.num_active;
    args.x = x.const_data_ptr();
    args.w_gate_up = weights.gate_up, args.w_down = weights.down;
    const auto data = [](const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; };
    args.gate_up_bias = data(weights.gate_up_bias), args.down_bias = data(weights.down_bias);
    args.active = plan.active, args.offsets = plan.offsets;
    args.sorted_token = plan.sorted_token, args.sorted_weight = plan.sorted_weight;
    args.packed_x = memory, args.packed_act = memory + packed_x,
    args.acc = memory + packed_x + packed_act;
    args.decoded = reinterpret_cast<bf16*>(args.acc + acc);
    args.out = out.mutable_data_ptr();
    if (phases.active) {
        args.enter_phase = [](void* ctx, const char* name) {
            static_cast<PhaseScopes*>(ctx)->enter(name);
        };
        args.phase_ctx = &phases;
    }
    if (tokens > 0) (int8_activations ? kernels().experts_int8 : kernels().experts)(args);
}

namespace {

// experts() in a new tensor, or nothing where these kernels do not serve the call or its arguments
// do not fit together. All of that is decided here because deciding it in Python costs more than a
// small layer, when the interpreter has to come from memory like the weights; whoever gets nothing
// says what is wrong, in the names that its caller knows.
OptTensor try_experts(const Tensor& hidden, const Tensor& w_gate_up, const Tensor& w_down,
                      const Tensor& topk_ids, const Tensor& topk_weights,
                      const OptTensor& gate_up_bias, const OptTensor& down_bias,
                      c10::string_view activation, bool gated, bool interleaved, bool transposed,
                      std::optional<double> limit, std::optional<double> alpha,
                      c10::string_view weight_format, c10::string_view down_format,
                      bool int8_activations, const OptTensor& gate_up_scale,
                      const OptTensor& down_scale) {
    const bool recording = at::GradMode::is_enabled();
    const auto served = [recording](const Tensor& t) {
        return t.is_cpu() && !(recording && t.requires_grad());
    };
    const bool all_served =
        served(hidden) && served(w_gate_up) && served(w_down) && served(topk_ids) &&
        served(topk_weights) && (!gate_up_bias || served(*gate_up_bias)) &&
        (!down_bias || served(*down_bias)) && (!gate_up_scale || served(*gate_up_scale)) &&
        (!down_scale || served(*down_scale)) && w_gate_up.is_contiguous() &&
        w_down.is_contiguous() && hidden.scalar_type() != at::kDouble;
    if (!all_served) return std::nullopt;
    Tensor out = fresh(hidden.sizes(), hidden.scalar_type());
    try {
        experts(hidden, w_gate_up, w_down, topk_ids, topk_weights, gate_up_bias, down_bias,
                activation, gated, interleaved, transposed, limit, alpha, weight_format,
                down_format, int8_activations, gate_up_scale, down_scale, out);
    } catch (const c10::ValueError&) {
        return std::nullopt;
    } catch (const c10::TypeError&) {
        return std::nullopt;
    }
    return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(moesd, CPU, m) { m.impl("experts", &experts); }
TORCH_LIBRARY_IMPL(moesd, CompositeExplicitAutograd, m) { m.impl("try_experts", &try_experts); }

}  // namespace moesd
