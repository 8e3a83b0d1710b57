// PlainProduct with AVX-512-VNNI: a lane holds a weight row, four adjacent activations are
// broadcast to all of them.
#pragma once

#include "../for_size.h"
#include "vnni.h"
#include "vnni_scales.h"

namespace moesd::MOESD_ISA {

class VnniProduct {
    static constexpr int kVectors = kRun / 4;  // of codes of a run
    static constexpr int kRows = 8;            // of activations that share the codes in registers

public:
    using Thread = PlainProduct::Thread;

    // Codes by run, by four of the run, and by row.
    template <class Format>
    __attribute__((noinline)) static void read(const StoredRow (&rows)[kTileRows], int64_t k,
                                               Ahead& ahead, CodeTile& out) {
        const uint8_t* packed[kTileRows];
        const Format first(rows[0]);
        typename Format::Place at(k, rows[0]);
        for (int r = 0; r < kTileRows; ++r) {
            packed[r] = Format(rows[r]).packed(at);
        }
        const uint8_t* const start = packed[0];
        GatheredScales<Format> scales(rows);
        for (int64_t run = 0; run < out.runs; ++run, at.next()) {
            auto* codes = reinterpret_cast<__m512i*>(out.codes) + run * kVectors;
            // Pointers that are read when they are needed; the compiler keeps them in vectors.
            asm volatile("" ::"r"(packed) : "memory");
            const int64_t offset = first.packed(at) - start;
            if constexpr (Format::kPacking == Packing::kAlternating) {
                const bool is_odd = at.run % 2;
                if (!is_odd || run == 0) widen_two(packed, offset, is_odd, codes);
            } else {
                widen<Format>(packed, offset, codes);
            }
            ahead.fetch();
            scales.read(first, at, out.scales + run * kTileRows, out.leasts + run * kTileRows);
        }
        if constexpr (!GatheredScales<Format>::kAll) {
            read_scales<Format>(rows, k, out, [](auto&&...) {});
        }
    }

    template <bool HasLeast>
    static void add(const CodeTile& tile, const Panel& x, int rows, float* sums, Ahead& ahead) {
        for (int m = 0; m < rows; m += kRows) {
            for_size<kRows>(rows - m < kRows ? rows - m : kRows, [&]<int M>() {
                add_rows<HasLeast, M>(tile, x, m, sums + m * kTileRows, ahead);
            });
        }
    }

protected:
    // `acc` and the sum of a run's products, for the row of a panel whose numbers are at `at`.
    template <bool HasLeast>
    static inline __attribute__((always_inline)) Vec added(Vec acc, __m512i dot, Vec scales,
                                                           Vec leasts, const Panel& x, int64_t at) {
        acc = fma(mul(_mm512_cvtepi32_ps(dot), scales), splat(x.scales[at]), acc);
        return HasLeast ? fma(leasts, splat(x.sums[at]), acc) : acc;
    }

private:
    // Sixteen bytes of each row, turned round: out[i] holds the i-th four of each.
    static inline __attribute__((always_inline)) void transpose(
        const uint8_t* const (&rows)[kTileRows], int64_t offset, __m512i (&out)[4]) {
        __m512i a[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
            const auto quarter = [&](int q) {
                return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[4 * q + n] + offset));
            };
            a[n] = _mm512_castsi128_si512(quarter(0));
            a[n] = _mm512_inserti32x4(a[n], quarter(1), 1);
            a[n] = _mm512_inserti32x4(a[n], quarter(2), 2);
            a[n] = _mm512_inserti32x4(a[n], quarter(3), 3);
        }
        const __m512i b0 = _mm512_unpacklo_epi32(a[0], a[1]);
        const __m512i b1 = _mm512_unpackhi_epi32(a[0], a[1]);
        const __m512i b2 = _mm512_unpacklo_epi32(a[2], a[3]);
        const __m512i b3 = _mm512_unpackhi_epi32(a[2], a[3]);
        out[0] = _mm512_unpacklo_epi64(b0, b2), out[1] = _mm512_unpackhi_epi64(b0, b2);
        out[2] = _mm512_unpacklo_epi64(b1, b3), out[3] = _mm512_unpackhi_epi64(b1, b3);
    }

    template <class Format>
    static inline __attribute__((always_inline)) void widen(const uint8_t* const (&rows)[kTileRows],
                                                            int64_t offset, __m512i* out) {
        constexpr bool kBytes = Format::kPacking == Packing::kBytes;
#pragma GCC unroll 2
        for (int half = 0; half < (kBytes ? 2 : 1); ++half) {
            __m512i v[4];
            transpose(rows, offset + half * 16, v);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                if constexpr (kBytes) {
                    out[4 * half + i] = _mm512_xor_si512(v[i], _mm512_set1_epi8(-128));
                } else {
                    out[i] = looked_up<Format>(low_halves(v[i]));
                    out[4 + i] = looked_up<Format>(high_halves(v[i]));
                }
            }
        }
    }

    // The second of the two runs that share bytes alone, or the first and the one after it.
    static inline __attribute__((always_inline)) void widen_two(
        const uint8_t* const (&rows)[kTileRows], int64_t offset, bool second_alone, __m512i* out) {
        __m512i* const second = second_alone ? out : out + kVectors;
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            __m512i v[4];
            transpose(rows, offset + half * 16, v);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                out[4 * half + i] = low_halves(v[i]);
                second[4 * half + i] = high_halves(v[i]);
            }
        }
    }

    static __m512i low_halves(__m512i bytes) {
        return _mm512_and_si512(bytes, _mm512_set1_epi8(15));
    }
    static __m512i high_halves(__m512i bytes) { return low_halves(_mm512_srli_epi16(bytes, 4)); }

    template <class Format>
    static __m512i looked_up(__m512i codes) {
        if constexpr (requires { Format::kIntegers; }) {
            const __m128i integers =
                _mm_load_si128(reinterpret_cast<const __m128i*>(Format::kIntegers));
            return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(integers), codes);
        } else {
            return codes;
        }
    }

    template <bool HasLeast, int M>
    __attribute__((noinline)) static void add_rows(const CodeTile& tile, const Panel& x, int first,
                                                   float* sums, Ahead& ahead) {
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
            const Vec leasts = load(tile.leasts + run * kTileRows);
            const int64_t at = run * kPanelRows + first;
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                __m512i dot = _mm512_set1_epi32(x.starts[at + m]);
#pragma GCC unroll 8
                for (int i = 0; i < kVectors; ++i) {
                    add_products(dot, w[i], x.codes + (at + m) * kRun + 4 * i);
                }
                acc[m] = added<HasLeast>(acc[m], dot, scales, leasts, x, at + m);
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) store(sums + m * kTileRows, acc[m]);
    }
};

}  // namespace moesd::MOESD_ISA
