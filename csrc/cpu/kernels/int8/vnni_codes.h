// The codes of sixteen rows: bytes of each, turned round, then taken apart.
#pragma once

#include "transposed.h"

namespace moesd::MOESD_ISA {

// The runs of a format that share bytes, and how many vectors of bytes these are.
constexpr int shared_runs(Packing packing) {
    return packing == Packing::kSixBits ? 4 : packing == Packing::kAlternating ? 2 : 1;
}
constexpr int shared_vectors(Packing packing) {
    switch (packing) {
        case Packing::kAdjacent:
        case Packing::kSplit: return 4;
        case Packing::kBytes:
        case Packing::kAlternating: return 8;
        case Packing::kSixBits: return 24;
    }
}

// Runs that share bytes, of sixteen rows. A vector has four adjacent codes of each row.
template <class Format>
class CodesOfTile {
    static constexpr Packing kPacking = Format::kPacking;

public:
    static constexpr int kRuns = shared_runs(kPacking);
    static constexpr int kVectors = kRun / 4;  // of a run

    // `address(row)`: where the codes of a row begin; `upper`: bytes from there to the upper bits.
    template <class Address>
    inline __attribute__((always_inline)) void take(const Address& address, int64_t upper) {
#pragma GCC unroll 6
        for (int i = 0; i < kBytes / 4; ++i) {
            const int64_t offset = i < 4 ? 16 * i : upper + 16 * (i - 4);
            __m512i v[4];
            transpose([&](int r) { return address(r) + offset; }, v);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) bytes_[4 * i + j] = v[j];
        }
    }

    inline __attribute__((always_inline)) void codes(int run, __m512i* out) const {
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) {
            if constexpr (kPacking == Packing::kBytes) {
                out[i] = _mm512_xor_si512(bytes_[i], _mm512_set1_epi8(-128));
            } else if constexpr (kPacking == Packing::kAlternating) {
                out[i] = half(bytes_[i], run);
            } else if constexpr (kPacking == Packing::kSixBits) {
                const __m512i lower = half(bytes_[run % 2 * kVectors + i], run / 2);
                const __m512i upper = pair(bytes_[2 * kVectors + i], run);
                out[i] = _mm512_or_si512(lower, upper);
            } else {
                out[i] = looked_up(half(bytes_[i % 4], i / 4));
            }
        }
    }

private:
    static constexpr int kBytes = shared_vectors(kPacking);

    // The low halves of bytes, or the high ones.
    static __m512i half(__m512i bytes, int which) {
        if (which == 1) bytes = _mm512_srli_epi16(bytes, 4);
        return _mm512_and_si512(bytes, _mm512_set1_epi8(15));
    }

    // Two bits of each byte, four places up.
    static __m512i pair(__m512i bytes, int which) {
        if (which < 2) bytes = _mm512_slli_epi16(bytes, 4 - 2 * which);
        if (which == 3) bytes = _mm512_srli_epi16(bytes, 2);
        return _mm512_and_si512(bytes, _mm512_set1_epi8(48));
    }

    static __m512i looked_up(__m512i codes) {
        if constexpr (requires { Format::kIntegers; }) {
            const __m128i integers =
                _mm_load_si128(reinterpret_cast<const __m128i*>(Format::kIntegers));
            return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(integers), codes);
        } else {
            return codes;
        }
    }

    __m512i bytes_[kBytes];
};

// Bytes from where a run's codes begin to their upper bits.
template <class Format, class Place>
int64_t to_upper(const Format& weights, const Place& at) {
    if constexpr (requires { weights.upper(at); }) return weights.upper(at) - weights.packed(at);
    else return 0;
}

}  // namespace moesd::MOESD_ISA
