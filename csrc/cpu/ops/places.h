// Where the tokens of a ragged batch lie: in tables, in the cache and in the batch. Plain loops,
// since there are few tokens and one of torch's ops takes longer than they do.
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
    const auto* source = static_cast<const char*>(rows.const_data_ptr());
    auto* target = static_cast<char*>(out.mutable_data_ptr());
    const int64_t* row = index.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < index.numel(); ++n) {
        TORCH_CHECK_INDEX(row[n] >= 0 && row[n] < rows.size(0), "index must be in [0, ",
                          rows.size(0), "), got ", row[n]);
        if (bytes > 0) std::memcpy(target + n * bytes, source + row[n] * bytes, bytes);
    }
    return out;
}

// Sequence b's token q is the batch's token b * Q + q: that number of the tokens in `columns` [B,
// n] of each sequence's Q. [B, n].
inline at::Tensor flat_index(const at::Tensor& columns, int64_t B, int64_t Q) {
    TORCH_CHECK_VALUE(columns.dim() == 2 && columns.size(0) == B, "columns must be [", B,
                      ", n], got ", columns.sizes());
    at::Tensor index = fresh(columns.sizes(), at::kLong);
    const auto column = columns.accessor<int64_t, 2>();
    int64_t* token = index.mutable_data_ptr<int64_t>();
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t n = 0; n < columns.size(1); ++n) {
            TORCH_CHECK_INDEX(column[b][n] >= 0 && column[b][n] < Q, "columns must be in [0, ", Q,
                              "), got ", column[b][n]);
            *token++ = b * Q + column[b][n];
        }
    }
    return index;
}

// For the tokens at `positions` [B, W] of cache rows `rows` [B], which hold `length` positions
// each: their places in the flattened cache, and the positions whose rotary angles they take; both
// [B * W]. Padding, at position -1, is written to its row's last position, which no query sees.
inline std::pair<at::Tensor, at::Tensor> cache_places(const at::Tensor& positions,
                                                      const at::Tensor& rows, int64_t length) {
    at::Tensor places = fresh({positions.numel()}, at::kLong);
    at::Tensor angles = fresh({positions.numel()}, at::kLong);
    const auto position = positions.accessor<int64_t, 2>();
    const auto row = rows.accessor<int64_t, 1>();
    int64_t* place = places.mutable_data_ptr<int64_t>();
    int64_t* angle = angles.mutable_data_ptr<int64_t>();
    for (int64_t b = 0; b < positions.size(0); ++b) {
        for (int64_t w = 0; w < positions.size(1); ++w) {
            const int64_t p = position[b][w];
            // Beyond it lies another row's first position.
            TORCH_CHECK_INDEX(p < length, "positions must be below ", length, ", got ", p);
            *place++ = row[b] * length + (p < 0 ? length - 1 : p);
            *angle++ = p < 0 ? 0 : p;
        }
    }
    return {places, angles};
}

// The position after the last one of each row of `positions` [B, W]: [B, 1].
inline at::Tensor next_positions(const at::Tensor& positions) {
    at::Tensor next = fresh({positions.size(0), 1}, at::kLong);
    const auto position = positions.accessor<int64_t, 2>();
    for (int64_t b = 0; b < positions.size(0); ++b) {
        next.mutable_data_ptr<int64_t>()[b] = position[b][positions.size(1) - 1] + 1;
    }
    return next;
}

}  // namespace moesd
