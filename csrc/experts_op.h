// The one C++ type of moesd::experts. Torch compares the types of a schema's kernels as their
// libraries load and ends the process where they differ (std::string_view is not std::string), so
// each device's kernel is held to this type where it is compiled.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace moesd {

using ExpertsOp = void(const at::Tensor& hidden, const at::Tensor& w_gate_up,
                       const at::Tensor& w_down, const at::Tensor& topk_ids,
                       const at::Tensor& topk_weights,
                       const std::optional<at::Tensor>& gate_up_bias,
                       const std::optional<at::Tensor>& down_bias, std::string_view activation,
                       bool gated, bool interleaved, bool transposed,
                       std::optional<double> activation_limit,
                       std::optional<double> activation_alpha, std::string_view weight_format,
                       std::string_view down_format, bool int8_activations,
                       const std::optional<at::Tensor>& gate_up_scale,
                       const std::optional<at::Tensor>& down_scale, at::Tensor& out);

}  // namespace moesd
