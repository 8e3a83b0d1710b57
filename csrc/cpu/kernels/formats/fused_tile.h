// dot_tile for weights that are decoded in registers, run by run, as they are multiplied: for the
// few activation rows that wait for memory, a buffer between the two would cost as much as the
// sums.
#pragma once

#include "../dot_rows.h"
#include "stored_row.h"

namespace moesd::MOESD_ISA {

constexpr int kFusedTokens = 4;  // more would leave no registers to decode in

// Whether a decoded run is a step of the dot products, and these read weights as they are. (With
// AMX bf16 weights go to tiles.)
template <class X>
#if defined(MOESD_AVX512_BF16) && !defined(MOESD_AMX)
constexpr bool kFused = std::is_same_v<X, bf16>;
#else
constexpr bool kFused = false;
#endif

// Elements of the longest block of the depth that is decoded, whole runs around it included, and
// from row to row of a buffer of them.
template <class X>
constexpr int64_t kKept = kWholeBytes / sizeof(typename Dot<X>::Act) + 2 * kRun;
template <class X>
constexpr int64_t kKeptStride = align_depth(kKept<X>);

// Elements [k0, k0 + length) of four rows, with the sums of dot_tile. `ahead`: bytes from a row's
// codes to those that are prefetched meanwhile. `kept`: where Keep, gets the decoded rows, each
// kKeptStride after the one before it.
template <class X, template <class> class Format, int M, bool Keep>
__attribute__((noinline)) void fused_tile(const X* const* xs, const StoredRow (&rows)[4],
                                          int64_t k0, int64_t length, int64_t ahead, X* kept,
                                          float* out, int64_t ld) {
    Vec acc[M][4];
    const X* x[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        x[m] = xs[m] + k0;
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) acc[m][n] = splat(0.0f);
    }
    Format<X> weights[4] = {Format<X>(rows[0]), Format<X>(rows[1]), Format<X>(rows[2]),
                            Format<X>(rows[3])};
    typename Format<X>::Place place(k0, rows[0]);
    for (int64_t k = 0; k < length; k += kRun, place.next()) {
        alignas(64) X local[4][kRun];
        X* run[4];
        // A long block has lines that begin where none of its runs do.
        int64_t passed = 0;
        if constexpr (requires { place.passed(); }) passed = place.passed();
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
            __builtin_prefetch(weights[n].codes(place) + passed + ahead, 0, 2);
            run[n] = Keep ? kept + n * kKeptStride<X> + k : local[n];
        }
        decode_two(weights[0], weights[1], place, run[0], run[1]);
        decode_two(weights[2], weights[3], place, run[2], run[3]);
        const X* const w[4] = {run[0], run[1], run[2], run[3]};
        const X* at[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) at[m] = x[m] + k;
        Dot<X>::step(acc, at, w, 0);
    }
    store_sums(acc, k0 > 0, out, ld);
}

template <class X>
using FusedTile = void(int count, const X* const* xs, const StoredRow (&rows)[4], int64_t k0,
                       int64_t length, int64_t ahead, X* kept, float* out, int64_t ld);

// The first kFusedTokens of `count` activation rows, or all; where there are more, keeps what they
// need.
template <class X, template <class> class Format>
void fused_tiles(int count, const X* const* xs, const StoredRow (&rows)[4], int64_t k0,
                 int64_t length, int64_t ahead, X* kept, float* out, int64_t ld) {
    if (count > kFusedTokens) {
        return fused_tile<X, Format, kFusedTokens, true>(xs, rows, k0, length, ahead, kept, out,
                                                         ld);
    }
    for_size<kFusedTokens>(count, [&]<int M>() {
        fused_tile<X, Format, M, false>(xs, rows, k0, length, ahead, kept, out, ld);
    });
}

}  // namespace moesd::MOESD_ISA
