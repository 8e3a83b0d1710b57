// The second half of attention: values, weighted by the exponentials of their scores, are added to
// the sums of each row.
//
// Invariance: a row adds its positions in ascending order, in steps of kStepPositions that begin at
// the first position of a block, whatever rows share the pass.
#pragma once

#include <cstring>
#include <type_traits>

#include "dot.h"

namespace moesd::MOESD_ISA {

constexpr int kPrefetchDistance = 16;  // positions between a value read and the one prefetched

// How values of type W are read, weighted and added.
template <class W>
struct Values {
    using Weight = float;
    static constexpr int kWide = 2 * kLanes;  // columns that a pair of vectors holds
    static constexpr int kStepPositions = 1;  // positions that one step adds

    static void store_weights(Weight* out, Vec weights) { store(out, weights); }

    // From the order that columns have in accumulators to the order they have in memory.
    static void to_memory_order(Vec& a, Vec& b) {
        from_pack_order(static_cast<const W*>(nullptr), a, b);
    }

    // One step: low and high [m][p] += weights[m * ld] * values, for M rows and P * kWide columns
    // (or fewer: `columns`, then P is 1).
    template <int M, int P>
    static inline __attribute__((always_inline)) void step(Vec (&low)[M][P], Vec (&high)[M][P],
                                                           const Weight* weights, int64_t ld,
                                                           const W* values, int64_t stride, int64_t,
                                                           int64_t columns) {
        alignas(64) W tail[kWide];
        if (columns < kWide) {
            std::memset(static_cast<void*>(tail), 0, sizeof(tail));
            std::memcpy(tail, values, columns * sizeof(W));
        }
        const W* v = columns < kWide ? tail : values;
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            __builtin_prefetch(values + kPrefetchDistance * stride + p * kWide);
            const Vec a = load_low(v + p * kWide), b = load_high(v + p * kWide);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const Vec weight = splat(weights[m * ld]);
                low[m][p] = fma(weight, a, low[m][p]), high[m][p] = fma(weight, b, high[m][p]);
            }
        }
    }
};

#ifdef MOESD_AVX512_BF16
// Weights rounded to bf16, two positions at a time: one vdpbf16ps in place of two multiply-adds.
template <>
struct Values<bf16> {
    using Weight = bf16;
    static constexpr int kWide = 2 * kLanes;
    static constexpr int kStepPositions = 2;

    static void store_weights(Weight* out, Vec weights) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(weights));
    }

    // Interleaving the values of two positions puts the first four of every eight columns into one
    // vector and the second four into the other.
    static void to_memory_order(Vec& a, Vec& b) {
        const __m512i first =
            _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second =
            _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        const Vec low = _mm512_permutex2var_ps(a, first, b);
        b = _mm512_permutex2var_ps(a, second, b), a = low;
    }

    template <int M, int P>
    static inline __attribute__((always_inline)) void step(Vec (&low)[M][P], Vec (&high)[M][P],
                                                           const Weight* weights, int64_t ld,
                                                           const bf16* values, int64_t stride,
                                                           int64_t num_positions, int64_t columns) {
        const __mmask32 valid = columns < kWide ? (uint32_t{1} << columns) - 1 : ~uint32_t{0};
        // A last position without a partner: the value after it is not read, since zero times NaN
        // would be NaN.
        const __mmask32 second_valid = num_positions > 1 ? valid : 0;
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            const bf16* v = values + p * kWide;
            __builtin_prefetch(v + kPrefetchDistance * stride);
            __builtin_prefetch(v + (kPrefetchDistance + 1) * stride);
            const __m512i x = _mm512_maskz_loadu_epi16(valid, v);
            const __m512i y = _mm512_maskz_loadu_epi16(second_valid, v + stride);
            const __m512bh a = (__m512bh)_mm512_unpacklo_epi16(x, y);
            const __m512bh b = (__m512bh)_mm512_unpackhi_epi16(x, y);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                int32_t pair;
                std::memcpy(&pair, weights + m * ld, sizeof(pair));
                const __m512bh weight = (__m512bh)_mm512_set1_epi32(pair);
                low[m][p] = _mm512_dpbf16_ps(low[m][p], weight, a);
                high[m][p] = _mm512_dpbf16_ps(high[m][p], weight, b);
            }
        }
    }
};
#endif

// acc[m * width] += sum over i of weights[m * ld + i] * values[i * stride], i < num_positions, for
// M rows and P * kWide columns (or fewer: `columns`, then P is 1).
template <class W, int M, int P>
void add_columns(float* acc, int64_t width, const typename Values<W>::Weight* weights, int64_t ld,
                 const W* values, int64_t stride, int64_t num_positions, int64_t columns) {
    constexpr int kWide = Values<W>::kWide, kStepPositions = Values<W>::kStepPositions;
    Vec low[M][P], high[M][P];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            low[m][p] = load(acc + m * width + p * kWide);
            high[m][p] = load(acc + m * width + p * kWide + kLanes);
        }
    }
    int64_t i = 0;
    for (; i + kStepPositions <= num_positions; i += kStepPositions) {
        Values<W>::step(low, high, weights + i, ld, values + i * stride, stride, kStepPositions,
                        columns);
    }
    if (i < num_positions) {
        Values<W>::step(low, high, weights + i, ld, values + i * stride, stride, num_positions - i,
                        columns);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
            store(acc + m * width + p * kWide, low[m][p]);
            store(acc + m * width + p * kWide + kLanes, high[m][p]);
        }
    }
}

// The same for all `dim` columns, P pairs of vectors at a time.
template <class W, int M, int P>
void add_all_columns(float* acc, int64_t width, const typename Values<W>::Weight* weights,
                     int64_t ld, const W* values, int64_t stride, int64_t num_positions,
                     int64_t dim) {
    constexpr int kWide = Values<W>::kWide;
    int64_t d = 0;
    for (; d + P * kWide <= dim; d += P * kWide) {
        add_columns<W, M, P>(acc + d, width, weights, ld, values + d, stride, num_positions, kWide);
    }
    for (; d < dim; d += kWide) {
        const int64_t columns = dim - d < kWide ? dim - d : kWide;
        add_columns<W, M, 1>(acc + d, width, weights, ld, values + d, stride, num_positions,
                             columns);
    }
}

// acc[m * width] += sum over i of weights[m * ld + i] * values[i * stride], for `count` rows m,
// i < num_positions and `dim` columns. Weights are zero from num_positions to the end of a step.
template <class W>
void add_values(float* acc, int64_t width, int count, const typename Values<W>::Weight* weights,
                int64_t ld, const W* values, int64_t stride, int64_t num_positions, int64_t dim) {
    constexpr int kPairs = kTileTokens == 6 ? 2 : 1;  // six rows of two pairs need 32 registers
    const auto rows = [&]<int M, int P>() {
        add_all_columns<W, M, P>(acc, width, weights, ld, values, stride, num_positions, dim);
        acc += M * width, weights += M * ld, count -= M;
    };
    while (count >= 6) rows.template operator()<6, kPairs>();
    if (count >= 4) rows.template operator()<4, kPairs>();
    if (count >= 2) rows.template operator()<2, 2>();
    if (count >= 1) rows.template operator()<1, 4>();
}

}  // namespace moesd::MOESD_ISA
