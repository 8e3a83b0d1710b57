// int8 and int4: signed integers in groups that share a scale in bf16.
#pragma once

#include "stored_row.h"

namespace moesd::MOESD_ISA {

// Calls f(first run, end run, scale) for each group's part of runs [k, k + n).
template <class F>
inline void for_groups(const StoredRow& row, int64_t k, int64_t n, const F& f) {
    for (int64_t end; n > 0; n -= end - k, k = end) {
        end = (k / row.group + 1) * row.group;
        if (end > k + n) end = (k + n + kRun - 1) / kRun * kRun;
        f(k, end, splat(widened(load_at<bf16>(row.scales + k / row.group * sizeof(bf16)))));
    }
}

template <class X>
void decode_int8(const StoredRow& row, int64_t k, int64_t n, X* out) {
    for_groups(row, k, n, [&](int64_t i, int64_t end, Vec scale) {
        for (; i < end; i += kRun) scale_run(row.data + i, scale, out + (i - k));
    });
}

// Weight 2i is in the low half of byte i, eight less than the number there.
template <class X>
void decode_int4(const StoredRow& row, int64_t k, int64_t n, X* out) {
    for_groups(row, k, n, [&](int64_t i, int64_t end, Vec scale) {
        const auto palette = palette_of<X>(kMinus8To7, [&](Vec q) { return mul(q, scale); });
        for (; i < end; i += kRun) {
            palette.template look_up<Nibbles::kAdjacent>(row.data + i / 2, out + (i - k));
        }
    });
}

}  // namespace moesd::MOESD_ISA
