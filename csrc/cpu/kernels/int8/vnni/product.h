// PlainProduct with AVX-512-VNNI: a lane holds a weight row, four adjacent activations are
// broadcast to all of them.
#pragma once

#include "../../for_size.h"
#include "codes.h"
#include "instruction.h"
#include "scales.h"

namespace moesd::MOESD_ISA {

class VnniProduct {
    static constexpr int kVectors = kRun / 4;  // of codes of a run
    static constexpr int kRows = 8;            // of activations that share the codes in registers

public:
    using Thread = PlainProduct::Thread;
    static constexpr int kFusedRows = kPanelRows;

    // Codes by run, by four of the run, and by row.
    template <class Format>
    __attribute__((noinline)) static void read(const StoredRow (&rows)[kTileRows], int64_t k,
                                               WeightsAhead& ahead, CodeTile& out) {
        const uint8_t* packed[kTileRows];
        const Format first(rows[0]);
        typename Format::Place at(k, rows[0]);
        for (int r = 0; r < kTileRows; ++r) packed[r] = Format(rows[r]).packed(at);
        const uint8_t* const start = packed[0];
        ScalesOfTile<Format> scales(rows, at);
        CodesOfTile<Format> bytes;
        for (int64_t run = 0; run < out.runs; run += bytes.kRuns) {
            // Pointers that are read when they are needed; the compiler keeps them in vectors.
            asm volatile("" ::"r"(packed) : "memory");
            const int64_t offset = first.packed(at) - start;
            bytes.take([&](int r) { return packed[r] + offset; }, to_upper(first, at));
#pragma GCC unroll 8
            for (int i = 0; i < bytes.kRuns; ++i, at.next()) {
                bytes.codes(i, reinterpret_cast<__m512i*>(out.codes) + (run + i) * kVectors);
                ahead.fetch();
                Vec scale, other;
                scales.read(first, at, scale, other);
                store(out.scales + (run + i) * kTileRows, scale);
                if (Format::kScaling != Scaling::kOne) {
                    store(out.others + (run + i) * kTileRows, other);
                }
            }
        }
    }

    // The sums of a tile's rows over all the depth with up to kFusedRows rows of a panel, whose
    // codes stay in registers: added to `sums` as `add` does.
    template <class Format>
    __attribute__((noinline)) static void read_and_add(const StoredRow (&rows)[kTileRows],
                                                       int64_t runs, const Panel& x, int count,
                                                       float* sums, WeightsAhead& ahead) {
        const Format first(rows[0]);
        typename Format::Place at(0, rows[0]);
        EvenRows packed(first.packed(at), rows[1].data - rows[0].data);
        const uint8_t* before = first.packed(at);
        ScalesOfTile<Format> scales(rows, at);
        CodesOfTile<Format> bytes;
        for (int64_t run = 0; run < runs; run += bytes.kRuns) {
            packed.skip(first.packed(at) - before);
            before = first.packed(at);
            bytes.take(packed, to_upper(first, at));
#pragma GCC unroll 8
            for (int i = 0; i < bytes.kRuns; ++i, at.next()) {
                for (int64_t fetch = 0; fetch < kFetches; ++fetch) ahead.fetch();
                __m512i w[kVectors];
                bytes.codes(i, w);
                Vec scale, other;
                scales.read(first, at, scale, other);
                for (int m = 0; m < count; ++m) {
                    const int64_t row = (run + i) * kPanelRows + m;
                    const Vec acc = load(sums + m * kTileRows);
                    store(sums + m * kTileRows,
                          added<Format::kScaling>(acc, w, scale, other, x, row));
                }
            }
        }
    }

    template <Scaling S>
    static void add(const CodeTile& tile, const Panel& x, int rows, float* sums,
                    WeightsAhead& ahead) {
        for (int m = 0; m < rows; m += kRows) {
            for_size<kRows>(rows - m < kRows ? rows - m : kRows, [&]<int M>() {
                add_rows<S, M>(tile, x, m, sums + m * kTileRows, ahead);
            });
        }
    }

protected:
    // `acc` and the sum of a run's products, for the row of a panel whose numbers are at `at`.
    template <Scaling S>
    static inline __attribute__((always_inline)) Vec added(Vec acc, const __m512i* w, Vec scales,
                                                           Vec others, const Panel& x, int64_t at) {
        const int8_t* const codes = x.codes + at * kRun;
        __m512i dots[2] = {_mm512_set1_epi32(x.starts[0][at]), _mm512_setzero_si512()};
        if (S == Scaling::kHalves) dots[1] = _mm512_set1_epi32(x.starts[1][at]);
        constexpr int kHalf = kVectors / 2;
#pragma GCC unroll 4
        for (int i = 0; i < kHalf; ++i) {  // one chain would wait for its own sums
            add_products(dots[0], w[i], codes + 4 * i);
            add_products(dots[1], w[kHalf + i], codes + 4 * (kHalf + i));
        }
        if constexpr (S == Scaling::kHalves) {
            const Vec first = mul(_mm512_cvtepi32_ps(dots[0]), scales);
            return fma(fma(_mm512_cvtepi32_ps(dots[1]), others, first), splat(x.scales[at]), acc);
        } else {
            return added<S>(acc, _mm512_add_epi32(dots[0], dots[1]), scales, others, x, at);
        }
    }

    // The same with the sum.
    template <Scaling S>
    static inline __attribute__((always_inline)) Vec added(Vec acc, __m512i dot, Vec scales,
                                                           Vec others, const Panel& x, int64_t at) {
        acc = fma(mul(_mm512_cvtepi32_ps(dot), scales), splat(x.scales[at]), acc);
        return S == Scaling::kAndLeast ? fma(others, splat(x.sums[at]), acc) : acc;
    }

private:
    template <Scaling S, int M>
    __attribute__((noinline)) static void add_rows(const CodeTile& tile, const Panel& x, int first,
                                                   float* sums, WeightsAhead& ahead) {
        Vec acc[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[m] = load(sums + m * kTileRows);
        for (int64_t run = 0; run < tile.runs; ++run) {
            ahead.fetch();
            __m512i w[kVectors];
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i) {
                w[i] = _mm512_load_si512(tile.codes + (run * kVectors + i) * 64);
            }
            const Vec scales = load(tile.scales + run * kTileRows);
            const Vec others = load(tile.others + run * kTileRows);
            const int64_t at = run * kPanelRows + first;
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                acc[m] = added<S>(acc[m], w, scales, others, x, at + m);
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) store(sums + m * kTileRows, acc[m]);
    }
};

}  // namespace moesd::MOESD_ISA
