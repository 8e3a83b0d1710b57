// AVX2 + FMA + F16C: eight fp32 lanes.
#pragma once

#ifndef MOESD_INTRINSICS
#define MOESD_INTRINSICS <immintrin.h>
#endif
#include MOESD_INTRINSICS

#include "../kernels/formats/nibbles.h"
#include "../types.h"

namespace moesd::MOESD_ISA {

using Vec = __m256;
constexpr int kLanes = 8;
// Twelve accumulators, three activations and one weight fill the sixteen registers.
constexpr int kTileTokens = 3;

inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec sqrt(Vec a) { return _mm256_sqrt_ps(a); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// min and max return the second operand when either is NaN.
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }

// The largest lane; any of them when some are NaN.
inline float max_lanes(Vec v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
// The first lane in which a and b are equal, or kLanes.
inline int first_equal(Vec a, Vec b) {
    return __builtin_ctz(
        1u << kLanes | static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ))));
}

// 2^n for integral n in [-126, 127].
inline Vec exp2_int(Vec n) {
    __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}

// kLanes elements in memory order.
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load(const bf16* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline void store(half* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
// Each lane rounded to bf16, in the lower half of 32 bits.
inline __m256i bf16_bits(Vec v) {
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7fc00000), is_nan),
                             16);
}
inline void store(bf16* p, Vec v) {
    const __m256i bits = bf16_bits(v);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

inline float widened(half x) { return _cvtsh_ss(x.bits); }
inline float widened(bf16 x) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(x.bits << 16)));
}

inline Vec splat(bf16 x) { return splat(widened(x)); }
inline Vec splat(half x) { return splat(widened(x)); }

// 2 * kLanes elements in memory order.
template <class W>
inline void store_pair(W* p, Vec a, Vec b) {
    store(p, a), store(p + kLanes, b);
}
inline void store_pair(bf16* p, Vec a, Vec b) {
    const __m256i packed = _mm256_packus_epi32(bf16_bits(a), bf16_bits(b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

// kLanes signed bytes.
inline Vec widen_bytes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// 2 * kLanes numbers of FP8, E4M3: 0x7f and 0xff are NaN, there is no infinity. As fp16, of which
// the exponent is eight less, all others are exact.
inline void widen_e4m3(const uint8_t* p, Vec& a, Vec& b) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
    const __m256i largest = _mm256_set1_epi16(0x3f80);
    const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(shifted, largest), largest);
    // The sign of the byte is in the upper half of the word before it is shifted.
    const __m256i sign_too = _mm256_set1_epi16(static_cast<int16_t>(0xbf80));
    const __m256i numbers = _mm256_or_si256(_mm256_and_si256(shifted, sign_too), nan);
    a = mul(_mm256_cvtph_ps(_mm256_castsi256_si128(numbers)), splat(256.0f));
    b = mul(_mm256_cvtph_ps(_mm256_extracti128_si256(numbers, 1)), splat(256.0f));
}

// Thirty-two codes of four bits in the order of their weights.
template <Nibbles N>
inline __m256i nibbles(const uint8_t* codes) {
    const __m256i low = _mm256_set1_epi8(15);
    if constexpr (N == Nibbles::kLow || N == Nibbles::kHigh) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        return _mm256_and_si256(N == Nibbles::kHigh ? _mm256_srli_epi16(bytes, 4) : bytes, low);
    }
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m256i halves = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), low);
    if constexpr (N == Nibbles::kSplit) return halves;
    const __m128i a = _mm256_castsi256_si128(halves), b = _mm256_extracti128_si256(halves, 1);
    return _mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b));
}

// Sixteen numbers, rounded to W, by a code of four bits: the lower and the higher bytes of all of
// them.
template <class W>
class Palette {
public:
    Palette() = default;
    explicit Palette(const Vec (&v)[2]) {
        static_assert(sizeof(W) == 2);
        alignas(32) W numbers[16];
        store_pair(numbers, v[0], v[1]);
        const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(numbers));
        const __m256i low = _mm256_and_si256(bits, _mm256_set1_epi16(255));
        // The lower bytes of the first and the last eight numbers, then the higher ones.
        const __m256i bytes =
            _mm256_permute4x64_epi64(_mm256_packus_epi16(low, _mm256_srli_epi16(bits, 8)), 0xd8);
        low_ = _mm256_permute2x128_si256(bytes, bytes, 0x00);
        high_ = _mm256_permute2x128_si256(bytes, bytes, 0x11);
    }

    // The numbers of thirty-two codes.
    template <Nibbles N>
    void look_up(const uint8_t* codes, W* out) const {
        const __m256i code = nibbles<N>(codes);
        const __m256i low = _mm256_shuffle_epi8(low_, code),
                      high = _mm256_shuffle_epi8(high_, code);
        const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
        auto* to = reinterpret_cast<__m256i*>(out);
        _mm256_storeu_si256(to, _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(a, b, 0x31));
    }

private:
    __m256i low_, high_;
};

template <>
class Palette<float> {
public:
    Palette() = default;
    explicit Palette(const Vec (&v)[2]) : low_(v[0]), high_(v[1]) {}

    template <Nibbles N>
    void look_up(const uint8_t* codes, float* out) const {
        alignas(32) uint8_t code[32];
        _mm256_store_si256(reinterpret_cast<__m256i*>(code), nibbles<N>(codes));
        for (int i = 0; i < 32; i += kLanes) {
            const __m256i place =
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(code + i)));
            const Vec upper_half = _mm256_castsi256_ps(_mm256_slli_epi32(place, 28));
            store(out + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low_, place),
                                            _mm256_permutevar8x32_ps(high_, place), upper_half));
        }
    }

private:
    Vec low_, high_;
};

// A palette of seven bits is not worth its look-ups here.
template <class W>
class SignedPalette;
template <class W>
constexpr bool kHasSignedPalette = false;
template <class W>
struct TwoPalettes;
template <class W>
constexpr bool kHasTwoPalettes = false;

// v with every lane rounded to what storing it would keep.
inline Vec rounded(Vec v, const float*) { return v; }
inline Vec rounded(Vec v, const half*) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec rounded(Vec v, const bf16*) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits(v), 16));
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
    __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
}
inline Vec load_high(const bf16* p) {
    __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_castsi256_ps(
        _mm256_and_si256(raw, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void to_pack_order(const float*, Vec&, Vec&) {}
inline void to_pack_order(const half*, Vec&, Vec&) {}
inline void to_pack_order(const bf16*, Vec& a, Vec& b) {
    __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
    __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
    a = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8));
    b = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8));
}
inline void from_pack_order(const float*, Vec&, Vec&) {}
inline void from_pack_order(const half*, Vec&, Vec&) {}
inline void from_pack_order(const bf16*, Vec& a, Vec& b) {
    Vec low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    a = _mm256_permute2f128_ps(low, high, 0x20);
    b = _mm256_permute2f128_ps(low, high, 0x31);
}

template <class W>
constexpr bool kSplitsEvenOdd = false;
template <>
inline constexpr bool kSplitsEvenOdd<bf16> = true;

using Quad = __m128;
inline Quad load_quad(const float* p) { return _mm_loadu_ps(p); }
inline Quad add(Quad a, Quad b) { return _mm_add_ps(a, b); }
inline void store(float* p, Quad v) { _mm_storeu_ps(p, v); }

inline Quad sum4(Vec a, Vec b, Vec c, Vec d) {
    Vec s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

// Eight quads, two to a vector in ascending order: their first elements to a, the second ones to b,
// and so on.
inline void deal_quads(Vec& a, Vec& b, Vec& c, Vec& d) {
    const Vec ac = _mm256_permute2f128_ps(a, c, 0x20), ac2 = _mm256_permute2f128_ps(a, c, 0x31);
    const Vec bd = _mm256_permute2f128_ps(b, d, 0x20), bd2 = _mm256_permute2f128_ps(b, d, 0x31);
    const Vec x = _mm256_unpacklo_ps(ac, bd), y = _mm256_unpacklo_ps(ac2, bd2);
    const Vec z = _mm256_unpackhi_ps(ac, bd), w = _mm256_unpackhi_ps(ac2, bd2);
    a = _mm256_unpacklo_ps(x, y), b = _mm256_unpackhi_ps(x, y);
    c = _mm256_unpacklo_ps(z, w), d = _mm256_unpackhi_ps(z, w);
}

}  // namespace moesd::MOESD_ISA
