// The scales of sixteen rows, run by run, gathered where they lie.
#pragma once

#include "product.h"

namespace moesd::MOESD_ISA {

// Distances from the first row of what lies at a member in each of them: gathered, since a vector
// that was written in parts is read back late.
inline __m512i distances(const StoredRow (&rows)[kTileRows], const uint8_t* StoredRow::* member) {
    static_assert(sizeof(StoredRow) == 4 * sizeof(int64_t));
    const __m512i each = _mm512_set_epi64(28, 24, 20, 16, 12, 8, 4, 0);
    const __m512i first = _mm512_set1_epi64(reinterpret_cast<int64_t>(rows[0].*member));
    const auto eight = [&](int r) {
        return _mm512_cvtepi64_epi32(
            _mm512_sub_epi64(_mm512_i64gather_epi64(each, &(rows[r].*member), 8), first));
    };
    return _mm512_inserti64x4(_mm512_castsi256_si512(eight(0)), eight(8), 1);
}

inline Vec widened_halves(__m512i words) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)); }

// Of formats that it does not know it reads nothing.
template <class Format>
class GatheredScales {
    static constexpr bool kOne = requires { typename Format::Scale; };
    // Only the blocks of GGUF files hold their scales, and those are halves.
    static constexpr bool kBeside = [] {
        if constexpr (kOne) return !std::is_same_v<typename Format::Scale, half>;
        return false;
    }();

public:
    static constexpr bool kAll = kOne;

    explicit GatheredScales(const StoredRow (&rows)[kTileRows])
        : rows_(distances(rows, kBeside ? &StoredRow::scales : &StoredRow::data)) {}

    // What is read lies in the block that begins with the numbers, or is the aligned four bytes
    // that hold a scale.
    template <class Place>
    void read(const Format& first, const Place& at, float* scales, float* leasts) const {
        if constexpr (kOne) {
            const uint8_t* scale = first.scale(at);
            if constexpr (std::is_same_v<typename Format::Scale, half>) {
                const __m512i both = _mm512_i32gather_epi32(rows_, scale, 1);
                store(scales, widened_halves(both));
                if (Format::kHasLeast) store(leasts, widened_halves(_mm512_srli_epi32(both, 16)));
            } else if constexpr (std::is_same_v<typename Format::Scale, bf16>) {
                store(scales, _mm512_castsi512_ps(_mm512_slli_epi32(from(scale), 16)));
            } else {
                store(scales, powers(_mm512_and_si512(from(scale), _mm512_set1_epi32(255))));
            }
        }
    }

private:
    // Mxfp4's scale_to of these exponents.
    static Vec powers(__m512i exponents) {
        const __m512i powers_of_two = _mm512_sub_epi32(exponents, _mm512_set1_epi32(127));
        const Vec halves = _mm512_scalef_ps(splat(0.5f), _mm512_cvtepi32_ps(powers_of_two));
        const __mmask16 is_nan = _mm512_cmpeq_epi32_mask(exponents, _mm512_set1_epi32(255));
        return _mm512_mask_mov_ps(halves, is_nan, splat(__builtin_nanf("")));
    }

    // Of each row the aligned four bytes that hold what is at `scale` of the first row, moved down
    // to where it begins.
    __m512i from(const uint8_t* scale) const {
        const auto misaligned = static_cast<int32_t>(reinterpret_cast<uintptr_t>(scale) % 4);
        const __m512i places = _mm512_add_epi32(rows_, _mm512_set1_epi32(misaligned));
        const __m512i three = _mm512_set1_epi32(3);
        const __m512i words =
            _mm512_i32gather_epi32(_mm512_andnot_si512(three, places), scale - misaligned, 1);
        return _mm512_srlv_epi32(words, _mm512_slli_epi32(_mm512_and_si512(places, three), 3));
    }

    const __m512i rows_;
};

// Blocks of eight runs: d and dmin, then the factors that Q4_K::take_scales takes apart.
template <class X>
class GatheredScales<Q4_K<X>> {
public:
    static constexpr bool kAll = true;

    explicit GatheredScales(const StoredRow (&rows)[kTileRows])
        : rows_(distances(rows, &StoredRow::data)) {}

    template <class Place>
    void read(const Q4_K<X>& first, const Place& at, float* scales, float* leasts) {
        if (at.enters) take(first.codes(at));
        const __m512i shift = _mm512_set1_epi32(at.run % 4 * 8);
        __m512i scale = _mm512_srlv_epi32(packed_[0], shift);
        __m512i least = _mm512_srlv_epi32(packed_[1], shift);
        const __m512i six = _mm512_set1_epi32(63);
        if (at.run >= 4) {
            const __m512i low = _mm512_srlv_epi32(packed_[2], shift), four = _mm512_set1_epi32(15);
            const __m512i upper = _mm512_set1_epi32(48);
            scale = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(scale, 2), upper),
                                    _mm512_and_si512(low, four));
            least = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(least, 2), upper),
                                    _mm512_and_si512(_mm512_srli_epi32(low, 4), four));
        }
        store(scales, mul(d_, _mm512_cvtepi32_ps(_mm512_and_si512(scale, six))));
        store(leasts, mul(minus_least_, _mm512_cvtepi32_ps(_mm512_and_si512(least, six))));
    }

private:
    void take(const uint8_t* block) {
        const __m512i both = _mm512_i32gather_epi32(rows_, block, 1);
        d_ = widened_halves(both);
        minus_least_ = sub(splat(0.0f), widened_halves(_mm512_srli_epi32(both, 16)));
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
            packed_[i] = _mm512_i32gather_epi32(rows_, block + 4 + 4 * i, 1);
        }
    }

    const __m512i rows_;
    Vec d_, minus_least_;
    __m512i packed_[3];
};

}  // namespace moesd::MOESD_ISA
