// GCC/Clang vector extensions, four fp32 lanes: any processor, no special compiler flags.
#pragma once

#include <cmath>
#include <cstring>

#include "../kernels/formats/nibbles.h"
#include "../types.h"

namespace moesd::MOESD_ISA {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kTileTokens = 2;

inline Vec splat(float x) { return Vec{x, x, x, x}; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec sqrt(Vec a) {
    return Vec{std::sqrt(a[0]), std::sqrt(a[1]), std::sqrt(a[2]), std::sqrt(a[3])};
}
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
// min and max return the second operand when either is NaN.
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// The largest lane; any of them when some are NaN.
inline float max_lanes(Vec v) {
    float top = v[0];
    for (int l = 1; l < kLanes; ++l) top = v[l] > top ? v[l] : top;
    return top;
}
// The first lane in which a and b are equal, or kLanes.
inline int first_equal(Vec a, Vec b) {
    int lane = 0;
    while (lane < kLanes && a[lane] != b[lane]) ++lane;
    return lane;
}

// 2^n for integral n in [-126, 127].
inline Vec exp2_int(Vec n) {
    IntVec bits = (__builtin_convertvector(n, IntVec) + 127) << 23;
    return (Vec)bits;  // a vector cast keeps the bits
}

inline float widened(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline float widened(half x) {
    int exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
    float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                      : exponent == 31
                          ? (mantissa ? NAN : INFINITY)
                          : std::ldexp(static_cast<float>(mantissa | 1024), exponent - 25);
    return x.bits & 0x8000 ? -magnitude : magnitude;
}
inline bf16 narrow(float x, const bf16*) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline half narrow(float x, const half*) {
    uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    float magnitude = std::fabs(x);
    if (x != x) return {0x7e00};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    int exponent;
    std::frexp(magnitude, &exponent);
    int shift = magnitude == 0 || exponent < -13 ? 24 : 11 - exponent;
    int mantissa = static_cast<int>(std::nearbyint(std::ldexp(magnitude, shift)));
    // A mantissa that rounds up to 2048 carries into the exponent by itself.
    int biased = shift == 24 ? 0 : (exponent + 13) << 10;
    return {static_cast<uint16_t>(sign | (biased + mantissa))};
}

inline Vec splat(bf16 x) { return splat(widened(x)); }
inline Vec splat(half x) { return splat(widened(x)); }

// kLanes elements in memory order.
inline Vec load(const float* p) { return Vec{p[0], p[1], p[2], p[3]}; }
inline Vec load(const bf16* p) {
    return Vec{widened(p[0]), widened(p[1]), widened(p[2]), widened(p[3])};
}
inline Vec load(const half* p) {
    return Vec{widened(p[0]), widened(p[1]), widened(p[2]), widened(p[3])};
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(bf16* p, Vec v) {
    for (int i = 0; i < kLanes; ++i) p[i] = narrow(v[i], p);
}
inline void store(half* p, Vec v) {
    for (int i = 0; i < kLanes; ++i) p[i] = narrow(v[i], p);
}

// 2 * kLanes elements in memory order.
template <class W>
inline void store_pair(W* p, Vec a, Vec b) {
    store(p, a), store(p + kLanes, b);
}

// kLanes signed bytes.
inline Vec widen_bytes(const uint8_t* p) {
    const auto lane = [p](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); };
    return Vec{lane(0), lane(1), lane(2), lane(3)};
}

// 2 * kLanes numbers of FP8, E4M3: 0x7f and 0xff are NaN, there is no infinity. As fp16, of which
// the exponent is eight less, all others are exact.
inline void widen_e4m3(const uint8_t* p, Vec& a, Vec& b) {
    half numbers[2 * kLanes];
    for (int i = 0; i < 2 * kLanes; ++i) {
        const int magnitude = (p[i] & 0x7f) == 0x7f ? 0x7fff : (p[i] & 0x7f) << 7;
        numbers[i] = {static_cast<uint16_t>((p[i] & 0x80) << 8 | magnitude)};
    }
    a = mul(load(numbers), splat(256.0f)), b = mul(load(numbers + kLanes), splat(256.0f));
}

// Sixteen numbers, rounded to W, by a code of four bits.
template <class W>
class Palette {
public:
    Palette() = default;
    explicit Palette(const Vec (&v)[16 / kLanes]) {
        for (int i = 0; i < 16 / kLanes; ++i) store(numbers_ + i * kLanes, v[i]);
    }

    // The numbers of thirty-two codes.
    template <Nibbles N>
    void look_up(const uint8_t* codes, W* out) const {
        for (int i = 0; i < 32; ++i) {
            const int byte = N == Nibbles::kAdjacent ? i / 2 : N == Nibbles::kSplit ? i % 16 : i;
            const bool high = N == Nibbles::kHigh || (N == Nibbles::kAdjacent && i % 2) ||
                              (N == Nibbles::kSplit && i >= 16);
            out[i] = numbers_[high ? codes[byte] >> 4 : codes[byte] & 15];
        }
    }

private:
    W numbers_[16];
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
template <class W>
inline Vec rounded(Vec v, const W*) {
    W kept[kLanes];
    store(kept, v);
    return load(kept);
}

// 2 * kLanes elements in pack order, which here is memory order.
template <class W>
inline Vec load_low(const W* p) {
    return load(p);
}
template <class W>
inline Vec load_high(const W* p) {
    return load(p + kLanes);
}
template <class W>
inline void to_pack_order(const W*, Vec&, Vec&) {}
template <class W>
inline void from_pack_order(const W*, Vec&, Vec&) {}

template <class W>
constexpr bool kSplitsEvenOdd = false;

using Quad = Vec;
inline Quad load_quad(const float* p) { return load(p); }

inline Quad sum4(Vec a, Vec b, Vec c, Vec d) {
    return Quad{(a[0] + a[1]) + (a[2] + a[3]), (b[0] + b[1]) + (b[2] + b[3]),
                (c[0] + c[1]) + (c[2] + c[3]), (d[0] + d[1]) + (d[2] + d[3])};
}

// Four quads: their first elements to a, the second ones to b, and so on.
inline void deal_quads(Vec& a, Vec& b, Vec& c, Vec& d) {
    const Vec first{a[0], b[0], c[0], d[0]}, second{a[1], b[1], c[1], d[1]},
        third{a[2], b[2], c[2], d[2]};
    d = Vec{a[3], b[3], c[3], d[3]}, a = first, b = second, c = third;
}

}  // namespace moesd::MOESD_ISA
