// Dot products of a short depth with AVX-512-BF16. If lanes held parts of a sum, adding up the
// lanes would cost more than computing them. So weight rows are transposed: a lane holds an output,
// and a pair of activations is broadcast to all lanes. One transposition serves all activation
// rows.
//
// Invariance: an output accumulates the pairs of the depth in ascending order, whatever shares the
// call with it.
#pragma once

#include "dot.h"
#include "for_size.h"

namespace moesd::MOESD_ISA {

constexpr int64_t kMaxPairs = 128;  // of adjacent elements of the depth
// Activation rows that share a register tile with two vectors of outputs.
constexpr int kPairRows = 8;

// Sixteen vectors of sixteen 32-bit lanes, turned round: out[i] holds lane i of each.
inline void transpose16(__m512i (&a)[16], __m512i* out) {
    __m512i b[16];
#pragma GCC unroll 8
    for (int n = 0; n < 16; n += 2) {
        b[n] = _mm512_unpacklo_epi32(a[n], a[n + 1]);
        b[n + 1] = _mm512_unpackhi_epi32(a[n], a[n + 1]);
    }
#pragma GCC unroll 4
    for (int n = 0; n < 16; n += 4) {  // a[n + i]: lane i of every four, rows n to n + 3
        a[n] = _mm512_unpacklo_epi64(b[n], b[n + 2]);
        a[n + 1] = _mm512_unpackhi_epi64(b[n], b[n + 2]);
        a[n + 2] = _mm512_unpacklo_epi64(b[n + 1], b[n + 3]);
        a[n + 3] = _mm512_unpackhi_epi64(b[n + 1], b[n + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // a 4 x 4 transposition of quarters
        const __m512i low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x44),
                      high = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xee);
        const __m512i low2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x44);
        const __m512i high2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xee);
        out[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
        out[4 + i] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        out[8 + i] = _mm512_shuffle_i32x4(high, high2, 0x88);
        out[12 + i] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}

// pairs[k] = elements 2k and 2k + 1 of each of sixteen weight rows; where there are fewer, the last
// is repeated. Prefetches sixteen rows from `prefetch` on, unless it is null; by default into the
// second-level cache, since the first is full of pairs.
template <int Locality = 2>
inline void transpose_pairs(const bf16* w, int64_t stride, int64_t rows, int64_t depth,
                            const bf16* prefetch, __m512i* pairs) {
    for (int64_t k = 0; k < depth; k += 32, pairs += 16) {
        if (prefetch) {
#pragma GCC unroll 16
            for (int n = 0; n < 16; ++n) {
                __builtin_prefetch(prefetch + n * stride + k, 0, Locality);
            }
        }
        const __mmask32 valid = depth - k < 32 ? (uint32_t{1} << (depth - k)) - 1 : ~uint32_t{0};
        __m512i a[16];
#pragma GCC unroll 16
        for (int n = 0; n < 16; ++n) {
            a[n] = _mm512_maskz_loadu_epi16(valid, w + (n < rows ? n : rows - 1) * stride + k);
        }
        transpose16(a, pairs);
    }
}

// out[m * ld + 16 * n + lane] for M activation rows and N blocks of sixteen transposed weight rows.
template <int M, int N>
__attribute__((noinline)) void pairs_tile(const bf16* const* xs, const __m512i (*pairs)[kMaxPairs],
                                          int64_t count, float* out, int64_t ld) {
    Vec acc[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) acc[m][n] = splat(0.0f);
    }
    constexpr int kStepPairs = 4;  // pairs for which one address of an activation row serves
    for (int64_t k = 0; k < count; k += kStepPairs) {
        __m512i w[N][kStepPairs];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
            for (int i = 0; i < kStepPairs; ++i) w[n][i] = pairs[n][k + i];
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const bf16* x = xs[m] + 2 * k;
#pragma GCC unroll 4
            for (int i = 0; i < kStepPairs; ++i) {
                int32_t pair;
                std::memcpy(&pair, x + 2 * i, sizeof(pair));
                const __m512i v = _mm512_set1_epi32(pair);
#pragma GCC unroll 2
                for (int n = 0; n < N; ++n) {
                    acc[m][n] = _mm512_dpbf16_ps(acc[m][n], (__m512bh)v, (__m512bh)w[n][i]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) store(out + m * ld + n * kLanes, acc[m][n]);
    }
}

// dot_rows for depth <= 2 * kMaxPairs (columns up to the next multiple of 16 are overwritten).
inline void dot_pairs(const bf16* const* xs, int count, const bf16* w, int64_t stride, int64_t rows,
                      int64_t depth, const bf16* next, float* out, int64_t ld) {
    alignas(64) __m512i pairs[2][kMaxPairs];
    // A multiple of kStepPairs; the padding is zero in the activations and in the weights.
    const int64_t num_pairs = (depth + 7) / 8 * 4;
    const int tiles = (count + kPairRows - 1) / kPairRows;
    for (int64_t j = 0; j < rows; j += 2 * kLanes) {
        const int64_t left = rows - j;
        const bf16* block = w + j * stride;
        const bf16* prefetch = left > 2 * kLanes ? block + 2 * kLanes * stride : next;
        transpose_pairs(block, stride, left, depth, prefetch, pairs[0]);
        if (left > kLanes) {
            transpose_pairs(block + kLanes * stride, stride, left - kLanes, depth,
                            prefetch ? prefetch + kLanes * stride : nullptr, pairs[1]);
        }
        for (int t = 0; t < tiles; ++t) {
            const int m = count * t / tiles, size = count * (t + 1) / tiles - m;
            for_size<kPairRows>(size, [&]<int M>() {
                if (left > kLanes) pairs_tile<M, 2>(xs + m, pairs, num_pairs, out + m * ld + j, ld);
                else pairs_tile<M, 1>(xs + m, pairs, num_pairs, out + m * ld + j, ld);
            });
        }
    }
}

}  // namespace moesd::MOESD_ISA
