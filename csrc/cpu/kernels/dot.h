// The multiply-add step of dot products between packed activation rows and weight rows, which are
// read as they lie in memory; and the packing of activation rows.
//
// Invariance: lane l of a dot product accumulates elements l, l + kLanes, ... of the packed order
// with one fused multiply-add each, in ascending order, whatever the tile's shape; sum4 then adds
// the lanes in one fixed tree, per block of the depth. So a (row, output) pair has the same bits at
// every batch size, at every place in the batch and for every number of threads.
#pragma once

#include <cstring>
#include <type_traits>

#include "../types.h"

namespace moesd::MOESD_ISA {

// Copies n < N elements and fills up with zeros to N. (Vector headers overload it where a masked
// load does both.)
template <int N, class W>
inline void pad_step(const W* src, int64_t n, W* dst) {
    std::memset(static_cast<void*>(dst), 0, N * sizeof(W));
    std::memcpy(static_cast<void*>(dst), src, n * sizeof(W));
}

// One step of dot products: fp32 activations in pack order times weights of type W, widened to
// fp32.
template <class W>
struct Dot {
    using Act = float;
    static constexpr int kStep = 2 * kLanes;

    template <int M, int N>
    static inline __attribute__((always_inline)) void step(Vec (&acc)[M][N],
                                                           const Act* const (&x)[M],
                                                           const W* const (&w)[N], int64_t k) {
        half_step<0>(acc, x, w, k);
        // Keeps the compiler from holding all the raw weights across the halves, which spills
        // accumulators. (Said of all memory, it would keep the accumulators there.)
        asm("" : "+r"(k));
        half_step<kLanes>(acc, x, w, k);
    }

    template <int Half, int M, int N>
    static inline __attribute__((always_inline)) void half_step(Vec (&acc)[M][N],
                                                                const Act* const (&x)[M],
                                                                const W* const (&w)[N], int64_t k) {
        Vec v[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) v[m] = load(x[m] + k + Half);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            const Vec wide = Half == 0 ? load_low(w[n] + k) : load_high(w[n] + k);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) acc[m][n] = fma(v[m], wide, acc[m][n]);
        }
    }

    // Packs one step of fp32 values, which are in memory order.
    static void pack_step(const float* src, Act* dst) {
        Vec a = load(src), b = load(src + kLanes);
        to_pack_order(static_cast<const W*>(nullptr), a, b);
        store(dst, a), store(dst + kLanes, b);
    }
    // Element k of a packed row.
    static float unpack(const Act* row, int64_t k) {
        int64_t base = k / kStep * kStep, i = k - base;
        return row[base + (kSplitsEvenOdd<W> ? (i & 1) * kLanes + i / 2 : i)];
    }
};

#ifdef MOESD_AVX512_BF16
// One step in bf16: pairs of activations times pairs of weights, one vdpbf16ps for 32 elements.
template <>
struct Dot<bf16> {
    using Act = bf16;
    static constexpr int kStep = 2 * kLanes;

    template <int M, int N>
    static inline __attribute__((always_inline)) void step(Vec (&acc)[M][N],
                                                           const Act* const (&x)[M],
                                                           const bf16* const (&w)[N], int64_t k) {
        __m512bh wide[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) wide[n] = load_bf16_pairs(w[n] + k);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            __m512bh v = load_bf16_pairs(x[m] + k);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], v, wide[n]);
        }
    }
    static void pack_step(const float* src, Act* dst) {
        store(dst, load(src)), store(dst + kLanes, load(src + kLanes));
    }
    static float unpack(const Act* row, int64_t k) {
        uint32_t bits = static_cast<uint32_t>(row[k].bits) << 16;
        float f;
        std::memcpy(&f, &bits, 4);
        return f;
    }
};
#endif

// out[m * ld + n] = the sum of the lanes of acc[m][n], and of what `out` holds where it is added.
template <int M>
inline __attribute__((always_inline)) void store_sums(const Vec (&acc)[M][4], bool added,
                                                      float* out, int64_t ld) {
    if (added) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m, out += ld) {
            store(out, add(load_quad(out), sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3])));
        }
    } else {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m, out += ld) {
            store(out, sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]));
        }
    }
}

constexpr int64_t kMaxQuarter = 32;  // a quarter of the most weight rows that dot_rows takes

// Puts the sums of one activation row, which tiles store group by group (the first row of each
// quarter, the second row of each quarter, ...), into the order of the weight rows.
inline void sort_quarters(float* sums, int64_t quarter) {
    alignas(64) float groups[4 * kMaxQuarter];
    std::memcpy(groups, sums, 4 * quarter * sizeof(float));
    int64_t g = 0;
    for (; g + kLanes <= quarter; g += kLanes) {
        const float* in = groups + 4 * g;
        Vec a = load(in), b = load(in + kLanes);
        Vec c = load(in + 2 * kLanes), d = load(in + 3 * kLanes);
        deal_quads(a, b, c, d);
        store(sums + g, a), store(sums + quarter + g, b);
        store(sums + 2 * quarter + g, c), store(sums + 3 * quarter + g, d);
    }
    for (; g < quarter; ++g) {
        for (int n = 0; n < 4; ++n) sums[n * quarter + g] = groups[4 * g + n];
    }
}

// For weights stored transposed, [depth, columns]: out[m * ld + j] = sum over k of
// xs[m][k] * w[k * stride + j], in ascending order. Simple, since such checkpoints are rare: two
// vectors of columns at a time, and every weight is read again for each activation row.
template <class W>
void dot_columns(const typename Dot<W>::Act* const* xs, int count, const W* w, int64_t stride,
                 int64_t columns, int64_t depth, float* out, int64_t ld) {
    constexpr int kWide = 2 * kLanes;
    for (int64_t j = 0; j < columns; j += kWide) {
        const int64_t width = columns - j < kWide ? columns - j : kWide;
        for (int m = 0; m < count; ++m) {
            Vec a = splat(0.0f), b = splat(0.0f);
            for (int64_t k = 0; k < depth; ++k) {
                alignas(64) W tail[kWide] = {};
                const W* row = w + k * stride + j;
                if (width < kWide) {
                    row = static_cast<const W*>(std::memcpy(tail, row, width * sizeof(W)));
                }
                const Vec v = splat(Dot<W>::unpack(xs[m], k));
                a = fma(v, load_low(row), a), b = fma(v, load_high(row), b);
            }
            from_pack_order(w, a, b);
            alignas(64) float sums[kWide];
            store(sums, a), store(sums + kLanes, b);
            std::memcpy(out + m * ld + j, sums, width * sizeof(float));
        }
    }
}

// Packs n elements into a row of align_depth(n), zero-padded.
template <class W>
void pack_row(const W* src, int64_t n, typename Dot<W>::Act* dst) {
    constexpr int kStep = Dot<W>::kStep;
    if constexpr (std::is_same_v<W, typename Dot<W>::Act>) {  // memory order is pack order
        // A row of nothing may lie at null, from which memcpy may not copy even nothing.
        if (n > 0) std::memcpy(static_cast<void*>(dst), src, n * sizeof(W));
        std::memset(static_cast<void*>(dst + n), 0, (align_depth(n) - n) * sizeof(W));
        return;
    }
    for (int64_t k = 0; k < align_depth(n); k += kStep) {
        alignas(64) float step[kStep];
        if (k + kStep <= n) {
            store(step, load(src + k)), store(step + kLanes, load(src + k + kLanes));
        } else {
            alignas(64) W tail[kStep] = {};
            if (k < n) std::memcpy(tail, src + k, (n - k) * sizeof(W));
            store(step, load(tail)), store(step + kLanes, load(tail + kLanes));
        }
        Dot<W>::pack_step(step, dst + k);
    }
}

// Rounds n fp32 values to W.
template <class W>
inline void store_row(W* dst, const float* src, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
    if (i < n) {
        alignas(64) float in[kLanes] = {};
        alignas(64) W tail[kLanes];
        std::memcpy(in, src + i, (n - i) * sizeof(float));
        store(tail, load(in));
        std::memcpy(dst + i, tail, (n - i) * sizeof(W));
    }
}

// Widens n values to fp32.
template <class W>
inline void load_row(float* dst, const W* src, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
    if (i < n) {
        alignas(64) W tail[kLanes] = {};
        alignas(64) float wide[kLanes];
        std::memcpy(tail, src + i, (n - i) * sizeof(W));
        store(wide, load(tail));
        std::memcpy(dst + i, wide, (n - i) * sizeof(float));
    }
}

inline float widened(float x) { return x; }

}  // namespace moesd::MOESD_ISA
