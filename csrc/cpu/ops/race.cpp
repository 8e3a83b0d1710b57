// moesd::race: tokens drawn from probabilities by counter-based noise.
#include <torch/library.h>

#include "ops.h"

namespace moesd {
namespace {

using at::Tensor;

Tensor race(const Tensor& probs, const Tensor& keys) {
    TORCH_CHECK_VALUE(probs.dim() >= 1 && probs.size(-1) > 0,
                      "probs must be [..., V] with V > 0, got ", probs.sizes());
    const at::IntArrayRef sizes = probs.sizes().slice(0, probs.dim() - 1);
    TORCH_CHECK_TYPE(probs.scalar_type() == at::kFloat, "probs must be Float, got ",
                     probs.scalar_type());
    TORCH_CHECK_TYPE(keys.scalar_type() == at::kLong, "keys must be int64, got ",
                     keys.scalar_type());
    TORCH_CHECK_VALUE(keys.sizes() == sizes, "keys must be ", sizes, " as probs are, got ",
                      keys.sizes());
    const Tensor rows = probs.contiguous(), all_keys = keys.contiguous();
    Tensor ids = fresh(sizes, at::kLong);
    RaceArgs args{};
    args.width = probs.size(-1), args.rows = keys.numel();
    args.probs = rows.const_data_ptr<float>(), args.keys = all_keys.const_data_ptr<int64_t>();
    args.ids = ids.mutable_data_ptr<int64_t>();
    args.threads = team_size(probs.numel() * 8);  // integer multiplications, mostly
    args.run = run_team;
    if (args.rows > 0) kernels().race(args);
    return ids;
}

}  // namespace

TORCH_LIBRARY_IMPL(moesd, CPU, m) { m.impl("race", &race); }

}  // namespace moesd
