// Prefetching weights and the scales that lie apart from them.
#pragma once

#include "../ahead.h"

namespace moesd::MOESD_ISA {

struct WeightsAhead {
    Ahead codes{nullptr, 0, 1}, scales{nullptr, 0, 1};

    WeightsAhead() = default;  // of nothing

    // `rows` rows of a matrix from `first` on; `calls`: of fetch, by which all will have been
    // prefetched.
    WeightsAhead(const StoredWeights& w, int64_t first, int64_t rows, int64_t calls)
        : codes(of(w.data, first, rows, w.row_bytes, calls)),
          scales(of(w.scales, first, rows, w.scale_row_bytes, calls)) {}

    void fetch() { codes.fetch(), scales.fetch(); }

private:
    static Ahead of(const void* data, int64_t first, int64_t rows, int64_t bytes, int64_t calls) {
        if (!data) return {nullptr, 0, 1};
        return {static_cast<const uint8_t*>(data) + first * bytes, rows * bytes, calls};
    }
};

}  // namespace moesd::MOESD_ISA
