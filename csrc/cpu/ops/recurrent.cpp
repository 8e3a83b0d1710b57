// moesd::gated_delta_rule, selective_state_update, selective_scan, short_convolution and
// gated_rms_norm: checks, among them that every row lies inside the states and that none is written
// that is used twice.
#include "../recurrent.h"

#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "ops.h"

namespace moesd {
namespace {

using at::Tensor;

// For tensors that decide the sizes of others; `shape` names them.
void check_dim(const Tensor& t, const char* name, const char* shape, int64_t dim) {
    TORCH_CHECK_VALUE(t.dim() == dim, name, " must be ", shape, ", got ", t.sizes());
}

void check_shape(const Tensor& t, const char* name, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must be ", sizes, ", got ", t.sizes());
}

// Values of tokens as the kernels read them. `holder` keeps a copy alive where one is needed: the
// values of a token must be contiguous, tokens may lie anywhere.
TokenValues token_values(const Tensor& t, const char* name, at::IntArrayRef sizes,
                         const Tensor& like, const char* like_name, Tensor& holder) {
    check_shape(t, name, sizes);
    TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, " must be ", like.scalar_type(),
                     " like ", like_name, ", got ", t.scalar_type());
    int64_t inner = 1;
    bool dense = true;
    for (int64_t i = t.dim() - 1; i >= 2; --i) {
        dense &= t.size(i) == 1 || t.stride(i) == inner;
        inner *= t.size(i);
    }
    holder = dense ? t : t.contiguous();
    return {holder.const_data_ptr(), holder.stride(0), holder.stride(1)};
}

// Few numbers, contiguous in fp32.
const float* floats(const Tensor& t, const char* name, at::IntArrayRef sizes, Tensor& holder) {
    check_shape(t, name, sizes);
    storage_dtype(t, name);
    holder = t.to(at::kFloat).contiguous();
    return holder.const_data_ptr<float>();
}

const int64_t* indices(const Tensor& t, const char* name, int64_t batch, Tensor& holder) {
    TORCH_CHECK_TYPE(t.scalar_type() == at::kLong, name, " must be int64, got ", t.scalar_type());
    check_shape(t, name, {batch});
    holder = t.contiguous();
    return holder.const_data_ptr<int64_t>();
}

// What the operators over states take alike.
class States {
public:
    States(Tensor& states, const Tensor& rows, const Tensor& keep, const Tensor& counts,
           int64_t batch, int64_t tokens, std::vector<int64_t> sizes) {
        sizes.insert(sizes.begin(), states.dim() > 0 ? states.size(0) : 0);
        TORCH_CHECK_VALUE(states.sizes() == at::IntArrayRef(sizes), "states must be ",
                          at::IntArrayRef(sizes), ", got ", states.sizes());
        TORCH_CHECK_TYPE(states.scalar_type() == at::kFloat, "states must be Float, got ",
                         states.scalar_type());
        TORCH_CHECK_VALUE(states.is_contiguous(), "states must be contiguous, got strides ",
                          states.strides());
        data = states.mutable_data_ptr<float>();
        state_size = sizes[0] > 0 ? states.numel() / sizes[0] : 0;
        ragged = {batch, tokens, indices(rows, "rows", batch, rows_),
                  indices(keep, "keep", batch, keep_), indices(counts, "counts", batch, counts_)};
        check_rows(sizes[0]);
    }

    // Threads for a kernel that does so many multiply-adds to a number of state for each token.
    int threads(int64_t multiply_adds) const {
        // Reading and writing a number takes as long as about this many.
        constexpr int64_t kMoved = 10;
        int64_t passes = 0;
        for (int64_t b = 0; b < ragged.batch; ++b) {
            if (ragged.counts[b] > 0) passes += kMoved + ragged.counts[b] * multiply_adds;
        }
        return team_size(passes * state_size);
    }

    Ragged ragged;
    float* data;
    int64_t state_size;

private:
    void check_rows(int64_t states) const {
        std::vector<int64_t> user(states, -1);  // the sequence whose row it is
        for (int64_t b = 0; b < ragged.batch; ++b) {
            const int64_t row = ragged.rows[b], count = ragged.counts[b], keep = ragged.keep[b];
            TORCH_CHECK_INDEX(row >= 0 && row < states, "rows must be in [0, ", states, "), got ",
                              row);
            TORCH_CHECK_VALUE(count >= 0 && count <= ragged.tokens, "counts must be in [0, ",
                              ragged.tokens, "], got ", count);
            TORCH_CHECK_VALUE(keep >= 0 && keep <= count, "keep must be in [0, counts], got ", keep,
                              " of ", count);
            const int64_t other = user[row];
            TORCH_CHECK_VALUE(other < 0 || (keep == 0 && ragged.keep[other] == 0),
                              "rows that keep a token must be named once, got ", row, " for ",
                              other, " and ", b);
            user[row] = b;
        }
    }

    Tensor rows_, keep_, counts_;
};

void check_multiple(const char* name, int64_t heads, const char* part_name, int64_t parts) {
    TORCH_CHECK_VALUE(parts > 0 && heads % parts == 0, name, " must be a multiple of the ",
                      part_name, " ", parts, ", got ", heads);
}

void check_size(const char* name, int64_t size, int64_t most) {
    TORCH_CHECK_VALUE(size >= 1 && size <= most, name, " must be in [1, ", most, "], got ", size);
}

Tensor gated_delta_rule(const Tensor& query, const Tensor& key, const Tensor& value,
                        const Tensor& decay, const Tensor& beta, Tensor& states, const Tensor& rows,
                        const Tensor& keep, const Tensor& counts) {
    check_dim(query, "query", "[B, Q, Hk, Dk]", 4);
    check_dim(value, "value", "[B, Q, Hv, Dv]", 4);
    const int64_t B = value.size(0), Q = value.size(1), Hv = value.size(2), Dv = value.size(3);
    const int64_t Hk = query.size(2), Dk = query.size(3);
    check_multiple("value heads", Hv, "key heads", Hk);
    check_size("the key dimension", Dk, kMaxHeadDim);
    const States s(states, rows, keep, counts, B, Q, {Hv, Dk, Dv});
    Tensor held[5];
    DeltaRuleArgs args{};
    args.dtype = storage_dtype(value, "value");
    args.ragged = s.ragged, args.states = s.data;
    args.key_heads = Hk, args.heads = Hv, args.key_dim = Dk, args.value_dim = Dv;
    args.query = token_values(query, "query", {B, Q, Hk, Dk}, value, "value", held[0]);
    args.key = token_values(key, "key", {B, Q, Hk, Dk}, value, "value", held[1]);
    args.value = token_values(value, "value", value.sizes(), value, "value", held[2]);
    args.decay_per_channel = decay.dim() == 4;
    const int64_t decay_sizes[] = {B, Q, Hv, Dk};
    args.decay =
        floats(decay, "decay", {decay_sizes, size_t(args.decay_per_channel ? 4 : 3)}, held[3]);
    args.beta = floats(beta, "beta", {B, Q, Hv}, held[4]);
    Tensor out = fresh(value.sizes(), value.scalar_type());
    args.out = out.mutable_data_ptr();
    args.threads = s.threads(4);
    args.run = run_team;
    if (out.numel() > 0) kernels().delta_rule(args);
    return out;
}

// Both Mambas. `inner`: the sizes of a token of x; `own`: those of what each channel, or each head,
// has of its own, and `a` of A.
Tensor advance_state_space(StateSpaceArgs args, void (*kernel)(const StateSpaceArgs&),
                           const Tensor (&inputs)[6], Tensor& states, const Tensor (&indices)[3],
                           std::vector<int64_t> own, std::vector<int64_t> a, int64_t work) {
    const auto& [x, dt, A, B, C, D] = inputs;
    const int64_t batch = x.size(0), Q = x.size(1), N = args.state_size;
    check_size("the state size", N, kMaxStateSize);
    std::vector<int64_t> state(x.sizes().begin() + 2, x.sizes().end());
    state.push_back(N);
    const States s(states, indices[0], indices[1], indices[2], batch, Q, state);
    std::vector<int64_t> groups = B.sizes().vec();
    groups[0] = batch, groups[1] = Q;
    std::vector<int64_t> steps = own;
    steps.insert(steps.begin(), {batch, Q});
    Tensor held[6];
    args.dtype = storage_dtype(x, "x");
    args.ragged = s.ragged, args.states = s.data;
    args.x = token_values(x, "x", x.sizes(), x, "x", held[0]);
    args.dt = floats(dt, "dt", steps, held[1]);
    args.a = floats(A, "A", a, held[2]);
    args.b = token_values(B, "B", groups, x, "x", held[3]);
    args.c = token_values(C, "C", groups, x, "x", held[4]);
    args.d = floats(D, "D", own, held[5]);
    Tensor out = fresh(x.sizes(), x.scalar_type());
    args.out = out.mutable_data_ptr();
    args.threads = s.threads(work);
    args.run = run_team;
    if (out.numel() > 0) kernel(args);
    return out;
}

Tensor selective_state_update(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                              const Tensor& C, const Tensor& D, Tensor& states, const Tensor& rows,
                              const Tensor& keep, const Tensor& counts) {
    check_dim(x, "x", "[B, Q, Hh, P]", 4);
    check_dim(B, "B", "[B, Q, G, N]", 4);
    StateSpaceArgs args{};
    args.heads = x.size(2), args.head_dim = x.size(3);
    args.groups = B.size(2), args.state_size = B.size(3);
    check_multiple("heads", args.heads, "groups", args.groups);
    return advance_state_space(args, kernels().mamba2, {x, dt, A, B, C, D}, states,
                               {rows, keep, counts}, {args.heads}, {args.heads}, 3);
}

Tensor selective_scan(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                      const Tensor& C, const Tensor& D, Tensor& states, const Tensor& rows,
                      const Tensor& keep, const Tensor& counts) {
    check_dim(x, "x", "[B, Q, channels]", 3);
    check_dim(B, "B", "[B, Q, N]", 3);
    const int64_t channels = x.size(2), N = B.size(2);
    StateSpaceArgs args{};
    args.heads = 1, args.head_dim = channels, args.groups = 1, args.state_size = N;
    // Most of the work is an exponential.
    return advance_state_space(args, kernels().mamba, {x, dt, A, B, C, D}, states,
                               {rows, keep, counts}, {channels}, {channels, N}, 15);
}

Tensor short_convolution(const Tensor& window, const Tensor& weight, const OptTensor& bias,
                         std::optional<c10::string_view> activation) {
    check_dim(window, "window", "[B, W - 1 + Q, C]", 3);
    check_dim(weight, "weight", "[C, W]", 2);
    const int64_t C = window.size(2), taps = weight.size(1);
    check_size("taps", taps, kMaxTaps);
    check_like(weight, "weight", {C, taps}, window, "window");
    if (bias) check_like(*bias, "bias", {C}, window, "window");
    TORCH_CHECK_VALUE(window.size(1) >= taps - 1, "window must hold at least the ", taps - 1,
                      " inputs before the first token, got ", window.sizes());
    Tensor held;
    ConvolutionArgs args{};
    args.dtype = storage_dtype(window, "window");
    args.batch = window.size(0), args.tokens = window.size(1) - taps + 1;
    args.channels = C, args.taps = taps;
    args.window = token_values(window, "window", window.sizes(), window, "window", held);
    args.weight = weight.const_data_ptr();
    args.bias = bias ? bias->const_data_ptr() : nullptr;
    args.has_activation = activation.has_value();
    if (activation) args.activation = parse_activation(*activation);
    Tensor out = fresh({args.batch, args.tokens, C}, window.scalar_type());
    args.out = out.mutable_data_ptr();
    // Beside its taps an element is read, widened, activated and rounded.
    args.threads = team_size(out.numel() * (taps + 12));
    args.run = run_team;
    if (out.numel() > 0) kernels().convolution(args);
    return out;
}

// Rows of a tensor [..., H]; a view wherever strides allow one.
Tensor rows_of(const Tensor& t) {
    const Tensor rows = t.reshape({-1, t.size(-1)});
    return rows.stride(1) == 1 ? rows : rows.contiguous();
}

Tensor gated_rms_norm(const Tensor& x, const Tensor& gate, const Tensor& w, double eps,
                      int64_t group, bool gate_first, bool cast_first,
                      c10::string_view activation) {
    TORCH_CHECK_VALUE(x.dim() >= 1, "x must be [..., H], got ", x.sizes());
    check_shape(gate, "gate", x.sizes());
    TORCH_CHECK_TYPE(gate.scalar_type() == x.scalar_type(), "gate must be ", x.scalar_type(),
                     " like x, got ", gate.scalar_type());
    check_size("group", group, kMaxNormGroup);
    check_multiple("the width of x", x.size(-1), "group", group);
    TORCH_CHECK_VALUE(activation == "silu" || activation == "sigmoid",
                      "activation must be silu or sigmoid, got ", activation);
    GatedNormArgs args{};
    args.w_of_group = w.numel() == group;
    check_like(w, "w", {args.w_of_group ? group : x.size(-1)}, x, "x");
    args.dtype = storage_dtype(x, "x");
    Tensor out = fresh(x.sizes(), x.scalar_type());
    if (out.numel() == 0) return out;
    const Tensor rows = rows_of(x), gates = rows_of(gate);
    args.rows = rows.size(0), args.groups = x.size(-1) / group, args.width = group;
    args.x = rows.const_data_ptr(), args.x_row = rows.stride(0);
    args.gate = gates.const_data_ptr(), args.gate_row = gates.stride(0);
    args.w = w.const_data_ptr();
    args.eps = static_cast<float>(eps);
    args.gate_first = gate_first, args.cast_first = cast_first, args.sigmoid = activation != "silu";
    args.out = out.mutable_data_ptr();
    args.threads = team_size(x.numel() * 20);  // an exponential and a division, mostly
    args.run = run_team;
    kernels().gated_norm(args);
    return out;
}

TORCH_LIBRARY_IMPL(moesd, CPU, m) {
    m.impl("gated_delta_rule", &gated_delta_rule);
    m.impl("selective_state_update", &selective_state_update);
    m.impl("selective_scan", &selective_scan);
    m.impl("short_convolution", &short_convolution);
    m.impl("gated_rms_norm", &gated_rms_norm);
}

}  // namespace
}  // namespace moesd
