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
    static constexpr int kFusedRows = kPanelRows;

    // Codes by run, by four of the run, and by row.
    template <class Format>
    __attribute__((noinline)) static void read(const StoredRow (&rows)[kTileRows], int64_t k,
                                               WeightsAhead& ahead, CodeTile& out) {
        const uint8_t* packed[kTileRows];
        const Format first(rows[0]);
        typename Format::Place at(k, rows[0]);
        for (int r = 0; r < kTileRows; ++r) {
            packed[r] = Format(rows[r]).packed(at);
        }
        const uint8_t* const start = packed[0];
        ScalesOfTile<Format> scales(rows, at);
        for (int64_t run = 0; run < out.runs; ++run, at.next()) {
            auto* codes = reinterpret_cast<__m512i*>(out.codes) + run * kVectors;
            // Pointers that are read when they are needed; the compiler keeps them in vectors.
            asm volatile("" ::"r"(packed) : "memory");
            const int64_t offset = first.packed(at) - start;
            const auto address = [&](int r) { return packed[r] + offset; };
            if constexpr (Format::kPacking == Packing::kAlternating) {
                const bool is_odd = at.run % 2;
                if (!is_odd || run == 0) widen_two(address, is_odd, codes);
            } else {
                widen<Format>(address, codes);
            }
            ahead.fetch();
            Vec scale, least;
            scales.read(first, at, scale, least);
            store(out.scales + run * kTileRows, scale);
            if (Format::kHasLeast) store(out.leasts + run * kTileRows, least);
        }
    }

    // The sums of a tile's rows over all the depth with up to kFusedRows rows of a panel, whose
    // codes stay in registers: added to `sums` as `add` does.
    template <class Format>
    __attribute__((noinline)) static void read_and_add(const StoredRow (&rows)[kTileRows],
                                                       int64_t runs, const Panel& x, int count,
                                                       float* sums, WeightsAhead& ahead) {
        constexpr int kAtOnce = Format::kPacking == Packing::kAlternating ? 2 : 1;
        const Format first(rows[0]);
        typename Format::Place at(0, rows[0]);
        EvenRows packed(first.packed(at), rows[1].data - rows[0].data);
        const uint8_t* before = first.packed(at);
        ScalesOfTile<Format> scales(rows, at);
        for (int64_t run = 0; run < runs; run += kAtOnce) {
            __m512i w[kAtOnce * kVectors];
            packed.skip(first.packed(at) - before);
            before = first.packed(at);
            if constexpr (kAtOnce == 2) widen_two(packed, false, w);
            else widen<Format>(packed, w);
#pragma GCC unroll 2
            for (int i = 0; i < kAtOnce; ++i, at.next()) {
                for (int64_t fetch = 0; fetch < kFetches; ++fetch) ahead.fetch();
                Vec scale, least;
                scales.read(first, at, scale, least);
                for (int m = 0; m < count; ++m) {
                    const int64_t row = (run + i) * kPanelRows + m;
                    const Vec acc = load(sums + m * kTileRows);
                    store(sums + m * kTileRows,
                          added<Format::kHasLeast>(acc, w + i * kVectors, scale, least, x, row));
                }
            }
        }
    }

    template <bool HasLeast>
    static void add(const CodeTile& tile, const Panel& x, int rows, float* sums,
                    WeightsAhead& ahead) {
        for (int m = 0; m < rows; m += kRows) {
            for_size<kRows>(rows - m < kRows ? rows - m : kRows, [&]<int M>() {
                add_rows<HasLeast, M>(tile, x, m, sums + m * kTileRows, ahead);
            });
        }
    }

protected:
    // `acc` and the sum of a run's products, for the row of a panel whose numbers are at `at`.
    template <bool HasLeast>
    static inline __attribute__((always_inline)) Vec added(Vec acc, const __m512i* w, Vec scales,
                                                           Vec leasts, const Panel& x, int64_t at) {
        const int8_t* const codes = x.codes + at * kRun;
        __m512i dot = _mm512_set1_epi32(x.starts[at]), other = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; i += 2) {  // one chain would wait for its own sums
            add_products(dot, w[i], codes + 4 * i);
            add_products(other, w[i + 1], codes + 4 * i + 4);
        }
        dot = _mm512_add_epi32(dot, other);
        return added<HasLeast>(acc, dot, scales, leasts, x, at);
    }

    // The same with the sum.
    template <bool HasLeast>
    static inline __attribute__((always_inline)) Vec added(Vec acc, __m512i dot, Vec scales,
                                                           Vec leasts, const Panel& x, int64_t at) {
        acc = fma(mul(_mm512_cvtepi32_ps(dot), scales), splat(x.scales[at]), acc);
        return HasLeast ? fma(leasts, splat(x.sums[at]), acc) : acc;
    }

private:
    template <class Format, class Address>
    static inline __attribute__((always_inline)) void widen(const Address& address, __m512i* out) {
        constexpr bool kBytes = Format::kPacking == Packing::kBytes;
#pragma GCC unroll 2
        for (int half = 0; half < (kBytes ? 2 : 1); ++half) {
            __m512i v[4];
            transpose([&](int r) { return address(r) + half * 16; }, v);
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
    template <class Address>
    static inline __attribute__((always_inline)) void widen_two(const Address& address,
                                                                bool second_alone, __m512i* out) {
        __m512i* const second = second_alone ? out : out + kVectors;
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            __m512i v[4];
            transpose([&](int r) { return address(r) + half * 16; }, v);
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
            const Vec leasts = load(tile.leasts + run * kTileRows);
            const int64_t at = run * kPanelRows + first;
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                acc[m] = added<HasLeast>(acc[m], w, scales, leasts, x, at + m);
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) store(sums + m * kTileRows, acc[m]);
    }
};

}  // namespace moesd::MOESD_ISA
