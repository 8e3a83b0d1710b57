// Sums of products of integers over whole rows: weights of eight bits, and activations of eight
// bits, in as many bytes. They are exact, so that no order plays a part.
#pragma once

#include "../../types.h"

namespace moesd::MOESD_ISA {

constexpr int kRowsTogether = 4;  // of weights that are multiplied at a time

// Four rows of weights: `stride` bytes from one to the next, `depth` in each, a multiple of kRun.
// Missing ones are copies of the last.
struct FourRows {
    const int8_t* rows[kRowsTogether];
    int64_t depth;
    int64_t next;  // bytes to the rows that are read after these, or zero

    FourRows(const uint8_t* first, int64_t stride, int64_t count, int64_t depth_, int64_t next_)
        : depth(depth_), next(next_) {
        for (int64_t n = 0; n < kRowsTogether; ++n) {
            rows[n] = reinterpret_cast<const int8_t*>(first + (n < count ? n : count - 1) * stride);
        }
    }
};

// Works on any processor; vnni/row_product.h is the same in AVX-512.
class PlainRowProduct {
public:
    static constexpr int kTokens = 4;  // of a tile

    // sums[m * ld + n] = xs[m] . w.rows[n]. `starts` are -128 times the sums of the rows of x.
    template <int M, class Fetch>
    static void multiply(const int8_t* const* xs, const int32_t* starts, const FourRows& w,
                         Fetch& ahead, int32_t* sums, int64_t ld) {
        for (int m = 0; m < M; ++m) {
            for (int n = 0; n < kRowsTogether; ++n) {
                int32_t sum = 0;
                for (int64_t k = 0; k < w.depth; ++k) sum += int{xs[m][k]} * int{w.rows[n][k]};
                sums[m * ld + n] = sum;
            }
        }
    }
};

}  // namespace moesd::MOESD_ISA
