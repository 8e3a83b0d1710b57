// Where the tokens of a ragged batch lie: in tables, in the cache and among each other. Plain
// loops, since there are few tokens and one of torch's ops takes longer than they do.
#pragma once

#include <cstring>
#include <utility>

#include "ops.h"

namespace moesd {

// table[index] [N, W] for a table [rows, W] and N indices of any shape.
inline at::Tensor rows_of(const at::Tensor& table, const at::Tensor& index) {
    const at::Tensor rows = table.contiguous();
    at::Tensor out = fresh({index.numel(), rows.size(1)}, rows.scalar_type());
    const size_t bytes = rows.size(1) * rows.element_size();
    const auto* from = static_cast<const char*>(rows.const_data_ptr());
    auto* to = static_cast<char*>(out.mutable_data_ptr());
    const int64_t* row = index.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < index.numel(); ++n) {
        TORCH_CHECK_INDEX(row[n] >= 0 && row[n] < rows.size(0), "index must be in [0, ",
                          rows.size(0), "), got ", row[n]);
        std::memcpy(to + n * bytes, from + row[n] * bytes, bytes);
    }
    return out;
}

// Among the B * Q tokens of a batch, those in `columns` [B, n] of its sequences: [B, n].
inline at::Tensor flat_index(const at::Tensor& columns, int64_t B, int64_t Q) {
    TORCH_CHECK_VALUE(columns.dim() == 2 && columns.size(0) == B, "columns must be [", B,
                      ", n], got ", columns.sizes());
    at::Tensor index = fresh(columns.sizes(), at::kLong);
    const auto column = columns.accessor<int64_t, 2>();
    int64_t* to = index.mutable_data_ptr<int64_t>();
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t n = 0; n < columns.size(1); ++n) {
            TORCH_CHECK_INDEX(column[b][n] >= 0 && column[b][n] < Q, "columns must be in [0, ", Q,
                              "), got ", column[b][n]);
            *to++ = b * Q + column[b][n];
        }
    }
    return index;
}

// Where the tokens at `positions` [B, W] go in slabs of `slots` slots, and the positions of their
// angles: both [B * W]. Padding, at -1, goes to the last slot.
inline std::pair<at::Tensor, at::Tensor> cache_places(const at::Tensor& positions,
                                                      const at::Tensor& rows, int64_t slots) {
    at::Tensor index = fresh({positions.numel()}, at::kLong),
               angle = fresh({positions.numel()}, at::kLong);
    const auto position = positions.accessor<int64_t, 2>();
    const auto row = rows.accessor<int64_t, 1>();
    int64_t *to = index.mutable_data_ptr<int64_t>(), *turn = angle.mutable_data_ptr<int64_t>();
    for (int64_t b = 0; b < positions.size(0); ++b) {
        for (int64_t w = 0; w < positions.size(1); ++w) {
            const int64_t p = position[b][w];
            *to++ = row[b] * slots + (p < 0 ? slots - 1 : p), *turn++ = p < 0 ? 0 : p;
        }
    }
    return {index, angle};
}

// The position after the last one of each row of `positions` [B, W]: [B, 1].
inline at::Tensor following(const at::Tensor& positions) {
    at::Tensor next = fresh({positions.size(0), 1}, at::kLong);
    const auto position = positions.accessor<int64_t, 2>();
    for (int64_t b = 0; b < positions.size(0); ++b) {
        next.mutable_data_ptr<int64_t>()[b] = position[b][positions.size(1) - 1] + 1;
    }
    return next;
}

}  // namespace moesd
