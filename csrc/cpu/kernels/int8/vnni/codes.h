// The codes of sixteen rows: bytes of each, turned round, then taken apart.
#pragma once

#include "transposed.h"

namespace moesd::MOESD_ISA {

// The runs of a format that share bytes, and these.
struct Shared {
    int runs, lower, upper;  // vectors of codes, or of their lower bits, and of upper bits

    constexpr explicit Shared(Packing packing) : runs(1), lower(4), upper(0) {
        switch (packing) {
            case Packing::kAdjacent:
            case Packing::kSplit: return;
            case Packing::kBytes: lower = 8; return;
            case Packing::kAlternating: runs = 2, lower = 8; return;
            case Packing::kFiveBits: upper = 4; return;
            case Packing::kFiveBitsOfBlock: runs = 8, lower = 32, upper = 8; return;
            case Packing::kSixBits: runs = 4, lower = 16, upper = 8; return;
        }
    }
};

// Runs that share bytes, of sixteen rows. A vector has four adjacent codes of each row.
template <class Format>
class CodesOfTile {
    static constexpr Packing kPacking = Format::kPacking;
    static constexpr Shared kShared{kPacking};

public:
    static constexpr int kRuns = kShared.runs;
    static constexpr int kVectors = kRun / 4;  // of a run

    // `address(row)`: where the codes of a row begin; `upper`: bytes from there to the upper bits.
    template <class Address>
    inline __attribute__((always_inline)) void take(const Address& address, int64_t upper) {
        take_part(address, 0, kShared.lower, lower_);
        take_part(address, upper, kShared.upper, upper_);
    }

    inline __attribute__((always_inline)) void codes(int run, __m512i* out) const {
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) {
            if constexpr (kPacking == Packing::kBytes) {
                out[i] = _mm512_xor_si512(lower_[i], _mm512_set1_epi8(-128));
            } else if constexpr (kPacking == Packing::kAlternating) {
                out[i] = half(lower_[i], run);
            } else if constexpr (kPacking == Packing::kFiveBits) {
                out[i] = with_fifth(half(lower_[i % 4], i / 4), upper_[0], i);
            } else if constexpr (kPacking == Packing::kFiveBitsOfBlock) {
                const __m512i codes = half(lower_[run / 2 * kVectors + i], run % 2);
                out[i] = _mm512_or_si512(codes, moved(upper_[i], 4 - run, 16));
            } else if constexpr (kPacking == Packing::kSixBits) {
                const __m512i codes = half(lower_[run % 2 * kVectors + i], run / 2);
                out[i] = _mm512_or_si512(codes, moved(upper_[i], 4 - 2 * run, 48));
            } else {
                out[i] = looked_up(half(lower_[i % 4], i / 4));
            }
        }
    }

private:
    template <class Address>
    static inline __attribute__((always_inline)) void take_part(const Address& address,
                                                                int64_t offset, int vectors,
                                                                __m512i* out) {
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i += 4) {
            __m512i v[4];
            transpose([&](int r) { return address(r) + offset + 4 * i; }, v);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) out[i + j] = v[j];
        }
    }

    // The low halves of bytes, or the high ones.
    static __m512i half(__m512i bytes, int which) {
        if (which == 1) bytes = _mm512_srli_epi16(bytes, 4);
        return _mm512_and_si512(bytes, _mm512_set1_epi8(15));
    }

    // Bits of each byte, so many places up, those of `mask` alone.
    static __m512i moved(__m512i bytes, int places, char mask) {
        if (places > 0) bytes = _mm512_slli_epi16(bytes, places);
        if (places < 0) bytes = _mm512_srli_epi16(bytes, -places);
        return _mm512_and_si512(bytes, _mm512_set1_epi8(mask));
    }

    // Codes, sixteen more for each whose bit is set: a row's 32 bits are in its word, and these are
    // the codes of four of them.
    static __m512i with_fifth(__m512i codes, __m512i words, int four) {
        const __m512i first_bytes = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
        const __m512i which = _mm512_add_epi8(first_bytes, _mm512_set1_epi8(four / 2));
        const __m512i bits = _mm512_set1_epi32(four % 2 ? 0x80402010 : 0x08040201);
        const __mmask64 set = _mm512_test_epi8_mask(_mm512_shuffle_epi8(words, which), bits);
        return _mm512_mask_add_epi8(codes, set, codes, _mm512_set1_epi8(16));
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

    __m512i lower_[kShared.lower], upper_[kShared.upper > 0 ? kShared.upper : 1];
};

// Bytes from where a run's codes begin to their upper bits.
template <class Format, class Place>
int64_t to_upper(const Format& weights, const Place& at) {
    if constexpr (requires { weights.upper(at); }) return weights.upper(at) - weights.packed(at);
    else return 0;
}

}  // namespace moesd::MOESD_ISA
