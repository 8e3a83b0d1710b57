// What every weight format's decoder has in common.
//
// A decoder is a class template `Format<X>`, made of a row, whose decode(place, out) writes the
// kRun weights of a place as X. A `Format<X>::Place(k, row)` stands at weight k, a multiple of
// kRun, of any row like that one, and moves on by a run with next(); rows that are read together
// share one.
//
// A format whose weights are integers with one scale for each run, or two, has besides kPacking,
// and where a run's codes begin, packed(place), their upper bits at upper(place) if they lie apart;
// kMiddle, which is taken from a code; and scale_to(place, scale, other), by which a weight is
// scale * integer, and with kScaling kAndLeast the other number more; with kHalves the other is the
// scale of a run's second half. Where a code stands for another integer, kIntegers has those. Where
// the scale is a number of type Scale, or the exponent of a power of two if that is uint8_t, and a
// least the number after it, they lie at scale(place).
//
// A decoded weight is its format's definition in fp32 arithmetic, step by step and without fused
// operations, rounded once to X: what moesd_kernels/formats gives. (Where AVX-512-BF16 rounds
// activations, it rounds weights, too: what is too small for a normal bf16 becomes zero, which is
// what its dot products take it for.)
#pragma once

#include "../dot.h"

namespace moesd::MOESD_ISA {

struct StoredRow {
    const uint8_t* data;
    const uint8_t* scales;
    int64_t group;  // adjacent weights that share a scale
    int64_t depth;  // weights
};

constexpr int kRun = 32;

// What lies at any address.
template <class T>
inline T load_at(const uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof(T));
    return value;
}

using RunCodes = uint8_t __attribute__((vector_size(kRun)));

// kRun signed bytes times the scale.
template <class X>
inline void scale_run(const uint8_t* codes, Vec scale, X* out) {
#pragma GCC unroll 4
    for (int i = 0; i < kRun; i += 2 * kLanes) {
        store_pair(out + i, mul(widen_bytes(codes + i), scale),
                   mul(widen_bytes(codes + i + kLanes), scale));
    }
}

// The sixteen values that a code of four bits stands for: f of a vector of `codes`.
struct Levels {
    Vec of[16 / kLanes];

    template <class F>
    Levels(const float (&codes)[16], const F& f) {
#pragma GCC unroll 4
        for (int i = 0; i < 16 / kLanes; ++i) of[i] = f(load(codes + i * kLanes));
    }
};

// Decodes a run. A format of four bits has `kCodes`, what they stand for by `value`, and their
// order by `look_up`.
template <class X, class Format, class Place>
inline void decode_one(Format& weights, const Place& at, X* out) {
    if constexpr (requires { weights.decode(at, out); }) weights.decode(at, out);
    else weights.look_up(at, Palette<X>(Levels(Format::kCodes, weights.value(at)).of), out);
}

// Decodes a run at the same place of each of two rows.
template <class X, class Format, class Place>
inline void decode_two(Format& a, Format& b, const Place& at, X* out_a, X* out_b) {
    if constexpr (kHasTwoPalettes<X> && requires { a.value(at); }) {
        const Levels first(Format::kCodes, a.value(at)), second(Format::kCodes, b.value(at));
        const TwoPalettes<X> palettes(first.of, second.of);
        a.look_up(at, palettes.first, out_a), b.look_up(at, palettes.second, out_b);
    } else {
        decode_one(a, at, out_a), decode_one(b, at, out_b);
    }
}

alignas(64) inline constexpr float kZeroToFifteen[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                         8, 9, 10, 11, 12, 13, 14, 15};
alignas(64) inline constexpr float kMinus8To7[16] = {-8, -7, -6, -5, -4, -3, -2, -1,
                                                     0,  1,  2,  3,  4,  5,  6,  7};

}  // namespace moesd::MOESD_ISA
