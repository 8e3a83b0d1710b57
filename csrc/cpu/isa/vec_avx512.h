// AVX-512 F/BW/VL/DQ: sixteen fp32 lanes. With MOESD_AVX512_BF16 the dot products of bf16 weights
// use vdpbf16ps.
#pragma once

#ifndef MOESD_INTRINSICS
#define MOESD_INTRINSICS <immintrin.h>
#endif
#include MOESD_INTRINSICS

#include "../kernels/formats/nibbles.h"
#include "../types.h"

namespace moesd::MOESD_ISA {

using Vec = __m512;
constexpr int kLanes = 16;
// Twenty-four accumulators leave eight of the thirty-two registers for activations and weights.
constexpr int kTileTokens = 6;

inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec sqrt(Vec a) { return _mm512_sqrt_ps(a); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// min and max return the second operand when either is NaN.
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }

// The largest lane; any of them when some are NaN.
inline float max_lanes(Vec v) { return _mm512_reduce_max_ps(v); }
// The first lane in which a and b are equal, or kLanes.
inline int first_equal(Vec a, Vec b) {
    return __builtin_ctz(1u << kLanes | _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ));
}

// 2^n for integral n in [-126, 127].
inline Vec exp2_int(Vec n) {
    __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 23));
}

// kLanes elements in memory order.
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const bf16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void store(half* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#ifdef MOESD_AVX512_BF16
// One instruction, which takes numbers too small for a normal bf16 for zero, as the dot products
// do.
inline void store(bf16* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
}
// Each lane rounded to bf16, in the lower half of 32 bits.
inline __m512i bf16_bits(Vec v) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)); }
#else
// Each lane rounded to bf16, in the lower half of 32 bits.
inline __m512i bf16_bits(Vec v) {
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_srli_epi32(
        _mm512_mask_blend_epi32(is_nan, nearest, _mm512_set1_epi32(0x7fc00000)), 16);
}
inline void store(bf16* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bf16_bits(v)));
}
#endif

inline float widened(half x) { return _cvtsh_ss(x.bits); }
inline float widened(bf16 x) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(x.bits << 16)));
}

// Broadcasts from memory, where that of a number in a register would be a shuffle.
inline Vec splat(bf16 x) {
    return _mm512_castsi512_ps(_mm512_maskz_set1_epi16(0xaaaaaaaa, static_cast<int16_t>(x.bits)));
}
inline Vec splat(half x) {
    return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(x.bits)));
}

// 2 * kLanes elements in memory order.
template <class W>
inline void store_pair(W* p, Vec a, Vec b) {
    store(p, a), store(p + kLanes, b);
}
#ifdef MOESD_AVX512_BF16
inline void store_pair(bf16* p, Vec a, Vec b) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}
#endif

// kLanes signed bytes.
inline Vec widen_bytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// 2 * kLanes numbers of FP8, E4M3: 0x7f and 0xff are NaN, there is no infinity. As fp16, of which
// the exponent is eight less, all others are exact.
inline void widen_e4m3(const uint8_t* p, Vec& a, Vec& b) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m512i shifted = _mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7);
    const __m512i largest = _mm512_set1_epi16(0x3f80);
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(shifted, largest), largest);
    // The sign of the byte is in the upper half of the word before it is shifted.
    const __m512i sign_too = _mm512_set1_epi16(static_cast<int16_t>(0xbf80));
    const __m512i numbers =
        _mm512_mask_mov_epi16(_mm512_and_si512(shifted, sign_too), nan, _mm512_set1_epi16(0x7fff));
    a = mul(_mm512_cvtph_ps(_mm512_castsi512_si256(numbers)), splat(256.0f));
    b = mul(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(numbers, 1)), splat(256.0f));
}

// v with every lane rounded to what storing it would keep.
inline Vec rounded(Vec v, const float*) { return v; }
inline Vec rounded(Vec v, const half*) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec rounded(Vec v, const bf16*) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(bf16_bits(v), 16));
}

// 2 * kLanes elements in pack order: bf16 splits into even and odd elements, which needs no
// shuffle; others into halves.
template <class W>
inline Vec load_low(const W* p) {
    return load(p);
}
template <class W>
inline Vec load_high(const W* p) {
    return load(p + kLanes);
}
inline Vec load_low(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
inline Vec load_high(const bf16* p) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), mask));
}
inline void to_pack_order(const float*, Vec&, Vec&) {}
inline void to_pack_order(const half*, Vec&, Vec&) {}
inline void to_pack_order(const bf16*, Vec& a, Vec& b) {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd =
        _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    Vec e = _mm512_permutex2var_ps(a, even, b);
    b = _mm512_permutex2var_ps(a, odd, b), a = e;
}
inline void from_pack_order(const float*, Vec&, Vec&) {}
inline void from_pack_order(const half*, Vec&, Vec&) {}
inline void from_pack_order(const bf16*, Vec& a, Vec& b) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high =
        _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    Vec l = _mm512_permutex2var_ps(a, low, b);
    b = _mm512_permutex2var_ps(a, high, b), a = l;
}

template <class W>
constexpr bool kSplitsEvenOdd = false;
template <>
inline constexpr bool kSplitsEvenOdd<bf16> = true;

#ifdef MOESD_AVX512_BF16
inline __m512bh load_bf16_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
#endif

// n < 32 elements and zeros after them.
template <int N>
inline void pad_step(const bf16* src, int64_t n, bf16* dst) {
    static_assert(N == 32);
    _mm512_store_si512(dst, _mm512_maskz_loadu_epi16((uint32_t{1} << n) - 1, src));
}

using Quad = __m128;
inline Quad load_quad(const float* p) { return _mm_loadu_ps(p); }
inline Quad add(Quad a, Quad b) { return _mm_add_ps(a, b); }
inline void store(float* p, Quad v) { _mm_storeu_ps(p, v); }

// Interleaving before folding: one tree of shuffles for four sums, where four folds would need
// seven more instructions.
inline Quad sum4(Vec a, Vec b, Vec c, Vec d) {
    const __m512d ab = _mm512_castps_pd(add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    const Vec abcd = add(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    const __m256 half =
        _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Sixteen quads, four to a vector in ascending order: their first elements to a, the second ones to
// b, and so on.
inline void deal_quads(Vec& a, Vec& b, Vec& c, Vec& d) {
    const __m512i early =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i late = _mm512_add_epi32(early, _mm512_set1_epi32(2));
    const Vec ab = _mm512_permutex2var_ps(a, early, b), cd = _mm512_permutex2var_ps(c, early, d);
    const Vec ab2 = _mm512_permutex2var_ps(a, late, b), cd2 = _mm512_permutex2var_ps(c, late, d);
    a = _mm512_shuffle_f32x4(ab, cd, 0x44), b = _mm512_shuffle_f32x4(ab, cd, 0xee);
    c = _mm512_shuffle_f32x4(ab2, cd2, 0x44), d = _mm512_shuffle_f32x4(ab2, cd2, 0xee);
}

}  // namespace moesd::MOESD_ISA

#include "../kernels/formats/palettes_avx512.h"
