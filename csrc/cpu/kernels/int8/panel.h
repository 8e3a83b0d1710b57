// Activations of eight bits: scale * code, with a scale for each run of a row, the largest
// magnitude of the run over 127; codes are rounded to the nearest, ties to even. A run that holds
// a number that is not finite has a scale that is not finite.
#pragma once

#include "../formats/decoders.h"

namespace moesd::MOESD_ISA {

// Up to kPanelRows rows of activations, by run, and within it by row.
struct Panel {
    int8_t* codes;  // kRun of each
    float* scales;
    float* sums;  // scale times the sum of the codes
    // Of sums of products, whose weights' codes are too large by `middle`: all of it in the first,
    // or that of a half of the run in each.
    int32_t* starts[2];

    static constexpr int64_t kBytesOfRun = kPanelRows * (kRun + 4 * sizeof(float));
    static constexpr int64_t bytes_of(int64_t depth) { return depth / kRun * kBytesOfRun; }

    Panel(void* memory, int64_t depth)
        : codes(static_cast<int8_t*>(memory)),
          scales(reinterpret_cast<float*>(codes + depth * kPanelRows)),
          sums(scales + depth / kRun * kPanelRows),
          starts{reinterpret_cast<int32_t*>(sums + depth / kRun * kPanelRows),
                 starts[0] + depth / kRun * kPanelRows} {}
    // From a run on.
    Panel(const Panel& whole, int64_t run)
        : codes(whole.codes + run * kPanelRows * kRun),
          scales(whole.scales + run * kPanelRows),
          sums(whole.sums + run * kPanelRows),
          starts{whole.starts[0] + run * kPanelRows, whole.starts[1] + run * kPanelRows} {}
};

// The bits of the largest magnitude of a run, in the order of magnitudes, above which come infinity
// and what is not a number.
inline uint32_t largest_magnitude(const float* x) {
    uint32_t bits[kRun], largest = 0;
    std::memcpy(bits, x, sizeof(bits));
    for (int i = 0; i < kRun; ++i) {
        const uint32_t magnitude = bits[i] & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

// The scale of numbers with that largest magnitude.
struct CodeScale {
    float scale, inverse;

    explicit CodeScale(uint32_t largest) {
        float most;
        std::memcpy(&most, &largest, sizeof(most));
        scale = most / 127.0f;
        // The inverse of anything smaller would overflow.
        inverse = most >= 1e-36f ? 127.0f / most : 0.0f;
    }
};

// Codes of a run.
inline void round_run(const float* x, float inverse, int8_t* codes) {
    // Added to a number, leaves it as an integer in the lower bits.
    constexpr float kToInteger = 12582912.0f;
    uint32_t bits[kRun];
    for (int i = 0; i < kRun; ++i) {
        const float shifted = x[i] * inverse + kToInteger;
        std::memcpy(bits + i, &shifted, sizeof(shifted));
    }
    for (int i = 0; i < kRun; ++i) codes[i] = static_cast<int8_t>(bits[i]);
}

// How a panel is packed for the weights it will be multiplied by.
struct PanelOrder {
    bool even_first;  // within eight codes the even ones come first, four to a half of the run
    bool by_half;     // whether each half of a run has a start of its own
    int middle;       // see Panel::starts
};

// Packs a run of a panel's row r.
inline void pack_numbers(const float* numbers, int64_t run, int r, PanelOrder order,
                         const Panel& out) {
    alignas(64) int8_t codes[kRun];
    const int64_t at = run * kPanelRows + r;
    const CodeScale scale(largest_magnitude(numbers));
    round_run(numbers, scale.inverse, codes);
    int halves[2] = {};
    for (int i = 0; i < kRun; ++i) halves[i / (kRun / 2)] += codes[i];
    const int sum = halves[0] + halves[1];
    out.scales[at] = scale.scale, out.sums[at] = scale.scale * static_cast<float>(sum);
    out.starts[0][at] = -order.middle * (order.by_half ? halves[0] : sum);
    out.starts[1][at] = -order.middle * (order.by_half ? halves[1] : 0);
    int8_t* packed = out.codes + at * kRun;
    if (!order.even_first) {
        std::memcpy(packed, codes, kRun);
        return;
    }
    for (int i = 0; i < kRun / 2; ++i) {
        packed[i] = codes[2 * i], packed[kRun / 2 + i] = codes[2 * i + 1];
    }
}

// Lets the rows of a run from `count` on count for nothing.
inline void clear_rows(int64_t run, int count, const Panel& out) {
    for (int64_t at = run * kPanelRows + count; at < (run + 1) * kPanelRows; ++at) {
        out.scales[at] = out.sums[at] = 0.0f, out.starts[0][at] = out.starts[1][at] = 0;
    }
}

// Packs a run of `count` <= kPanelRows rows.
template <class W>
void pack_run(const W* const* rows, int count, int64_t run, PanelOrder order, const Panel& out) {
    for (int r = 0; r < count; ++r) {
        alignas(64) float numbers[kRun];
        load_row(numbers, rows[r] + run * kRun, kRun);
        pack_numbers(numbers, run, r, order, out);
    }
    clear_rows(run, count, out);
}

}  // namespace moesd::MOESD_ISA
