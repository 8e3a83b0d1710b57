// The weight formats: their names, and what tensors they lie in.
#include <torch/library.h>

#include <string>
#include <vector>

#include "ops.h"

namespace moesd {
namespace {

using at::Tensor;

// What lies beside the data: nothing, a bf16 number for each group of a row, the exponent (E8M0)
// of each 32 weights, or an fp32 number for each square of kSquare weights.
enum class Scales { kNone, kGroups, kExponents, kSquares };
constexpr int64_t kSquare = 128, kExponentGroup = 32;

// The names of moesd_kernels/formats, which also says what the formats mean.
constexpr struct Format {
    const char* name;
    WeightFormat format;
    at::ScalarType dtype;
    int64_t block, bytes;  // weights of a block, and the bytes that hold them
    Scales scales;
    bool integers;  // with one scale for each 32 weights, or for 16
} kFormats[] = {
    // In the activations' dtype.
    {"plain", WeightFormat::kPlain, at::kFloat, 1, 0, Scales::kNone, false},
    {"fp8_block", WeightFormat::kFp8Block, at::kFloat8_e4m3fn, 1, 1, Scales::kSquares, false},
    {"mxfp4", WeightFormat::kMxfp4, at::kByte, 32, 16, Scales::kExponents, true},
    {"int8", WeightFormat::kInt8, at::kChar, 32, 32, Scales::kGroups, true},
    {"int4", WeightFormat::kInt4, at::kByte, 32, 16, Scales::kGroups, true},
    {"q8_0", WeightFormat::kQ8_0, at::kByte, 32, 34, Scales::kNone, true},
    {"q4_0", WeightFormat::kQ4_0, at::kByte, 32, 18, Scales::kNone, true},
    {"q4_1", WeightFormat::kQ4_1, at::kByte, 32, 20, Scales::kNone, true},
    {"q5_0", WeightFormat::kQ5_0, at::kByte, 32, 22, Scales::kNone, true},
    {"q5_1", WeightFormat::kQ5_1, at::kByte, 32, 24, Scales::kNone, true},
    {"q4_k", WeightFormat::kQ4_K, at::kByte, 256, 144, Scales::kNone, true},
    {"q5_k", WeightFormat::kQ5_K, at::kByte, 256, 176, Scales::kNone, true},
    {"q6_k", WeightFormat::kQ6_K, at::kByte, 256, 210, Scales::kNone, true},
};

std::vector<std::string> weight_format_names() {
    std::vector<std::string> names;
    for (const Format& known : kFormats) names.push_back(known.name);
    return names;
}

const Format& parse_format(c10::string_view name) {
    for (const Format& known : kFormats) {
        if (name == known.name) return known;
    }
    TORCH_CHECK_VALUE(false, "weight_format must be one of ", weight_format_names(), ", got ",
                      name);
}

void check_storage(const Tensor& t, const std::string& name, at::IntArrayRef sizes,
                   at::ScalarType dtype, const char* format) {
    TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must be ", sizes, " in the format ", format,
                      ", got ", t.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must be ", dtype, " in the format ", format,
                     ", got ", t.scalar_type());
    TORCH_CHECK_VALUE(t.is_contiguous(), name, " must be contiguous, got strides ", t.strides());
}

// Checks the scales beside weights of these sizes and enters them.
void enter_scales(const Tensor& scale, const std::string& name, const Format& format,
                  std::vector<int64_t> sizes, StoredWeights& weights) {
    int64_t& rows = sizes[sizes.size() - 2];
    int64_t& groups = sizes.back();
    const int64_t depth = groups;
    switch (format.scales) {
        case Scales::kNone: return;
        case Scales::kGroups: {
            const int64_t count = scale.dim() > 0 ? scale.size(-1) : 0;
            weights.group = count > 0 ? depth / count : kExponentGroup;
            const bool known = weights.group == 32 || weights.group == 64 || weights.group == 128;
            TORCH_CHECK_VALUE(count == 1 || (known && depth % weights.group == 0 &&
                                             count == depth / weights.group),
                              name, " must have one number for each 32, 64 or 128 of ", depth,
                              " weights of a row, or for all, got ", scale.sizes());
            // Places of groups are shifts.
            while (count == 1 && (weights.group & (weights.group - 1)) != 0) ++weights.group;
            groups = count;
            check_storage(scale, name, sizes, at::kBFloat16, format.name);
            break;
        }
        case Scales::kExponents:
            weights.group = kExponentGroup;
            groups = depth / kExponentGroup;
            check_storage(scale, name, sizes, at::kByte, format.name);
            break;
        case Scales::kSquares:
            weights.group = weights.rows_per_scale = kSquare;
            rows = (rows + kSquare - 1) / kSquare, groups = (depth + kSquare - 1) / kSquare;
            check_storage(scale, name, sizes, at::kFloat, format.name);
            break;
    }
    weights.scales = scale.const_data_ptr();
    weights.scale_row_bytes = groups * scale.element_size();
}

}  // namespace

bool is_plain(c10::string_view format) { return format == "plain"; }

bool has_integers(WeightFormat format) {
    for (const Format& known : kFormats) {
        if (known.format == format) return known.integers;
    }
    return false;
}

StoredWeights stored_weights(const Tensor& w, const char* name, const OptTensor& scale,
                             const char* scale_name, c10::string_view format_name,
                             std::vector<int64_t> sizes, const Tensor& like,
                             const char* like_name) {
    const Format& format = parse_format(format_name);
    StoredWeights weights{};
    weights.format = format.format, weights.rows_per_scale = weights.group = 1;
    const int64_t depth = sizes.back();
    if (format.format == WeightFormat::kPlain) {
        check_like(w, name, sizes, like, like_name);
        weights.row_bytes = depth * w.element_size();
    } else {
        TORCH_CHECK_VALUE(depth % format.block == 0, name, " in the format ", format.name,
                          " must have rows of a multiple of ", format.block, " weights, got ",
                          depth);
        weights.row_bytes = depth / format.block * format.bytes;
        std::vector<int64_t> stored = sizes;
        stored.back() = weights.row_bytes;
        check_storage(w, name, stored, format.dtype, format.name);
    }
    weights.data = w.const_data_ptr();
    const bool has_scale = format.scales != Scales::kNone;
    TORCH_CHECK_TYPE(scale.has_value() == has_scale, scale_name, " must ",
                     has_scale ? "be given" : "be None", " in the format ", format.name, ", got ",
                     scale ? "a tensor" : "None");
    if (scale) enter_scales(*scale, scale_name, format, std::move(sizes), weights);
    return weights;
}

TORCH_LIBRARY_IMPL(moesd, CompositeExplicitAutograd, m) {
    m.impl("weight_format_names", &weight_format_names);
}

}  // namespace moesd
