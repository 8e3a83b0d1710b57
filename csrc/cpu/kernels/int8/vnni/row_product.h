// PlainRowProduct with AVX-512-VNNI: lanes hold parts of a sum, as they do for plain weights.
#pragma once

#include "../row_product.h"
#include "instruction.h"

namespace moesd::MOESD_ISA {

class VnniRowProduct {
    static constexpr int64_t kStep = 64;  // bytes of a vector

public:
    static constexpr int kTokens = kTileTokens;

    // Rows of x are followed by zeros to a multiple of 64. The instruction takes one operand
    // without a sign: weights are 128 more than they are, which `starts` make up for.
    template <int M, class Fetch>
    __attribute__((noinline)) static void multiply(const int8_t* const* xs, const int32_t* starts,
                                                   const FourRows& w, Fetch& ahead, int32_t* sums,
                                                   int64_t ld) {
        __m512i acc[M][kRowsTogether];
        const int8_t* x[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            x[m] = xs[m];
#pragma GCC unroll 4
            for (int n = 0; n < kRowsTogether; ++n) acc[m][n] = _mm512_setzero_si512();
        }
        const int8_t* const rows[4] = {w.rows[0], w.rows[1], w.rows[2], w.rows[3]};
        int64_t k = 0;
        for (; k + kStep <= w.depth; k += kStep) {
            ahead.fetch();
#pragma GCC unroll 4
            for (int n = 0; n < kRowsTogether; ++n) __builtin_prefetch(rows[n] + w.next + k);
            step(acc, x, rows, k, ~__mmask64{0});
        }
        if (k < w.depth) step(acc, x, rows, k, (__mmask64{1} << (w.depth - k)) - 1);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const __m128i four = sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + m * ld),
                             _mm_add_epi32(four, _mm_set1_epi32(starts[m])));
        }
    }

private:
    // Bytes of a step that are not `valid` count for nothing.
    template <int M>
    static inline __attribute__((always_inline)) void step(
        __m512i (&acc)[M][kRowsTogether], const int8_t* const (&x)[M],
        const int8_t* const (&rows)[kRowsTogether], int64_t k, __mmask64 valid) {
        __m512i codes[kRowsTogether];
#pragma GCC unroll 4
        for (int n = 0; n < kRowsTogether; ++n) {
            codes[n] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(valid, rows[n] + k),
                                        _mm512_set1_epi8(-128));
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const __m512i v = _mm512_load_si512(x[m] + k);
#pragma GCC unroll 4
            for (int n = 0; n < kRowsTogether; ++n) add_products(acc[m][n], codes[n], v);
        }
    }

    // The sums of the lanes of four vectors.
    static inline __m128i sum4(__m512i a, __m512i b, __m512i c, __m512i d) {
        const __m512i ab =
            _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        const __m512i cd =
            _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        const __m512i abcd =
            _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        const __m256i half =
            _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
        return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    }
};

}  // namespace moesd::MOESD_ISA
