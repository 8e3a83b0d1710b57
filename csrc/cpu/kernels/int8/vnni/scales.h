// The scales of sixteen rows, run by run: gathered where codes lie beside them, turned round where
// scales lie by themselves.
#pragma once

#include "transposed.h"

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

// Rows of which four bytes each are gathered.
class GatheredRows {
public:
    template <class Place>
    GatheredRows(const StoredRow (&rows)[kTileRows], const Place&)
        : distances_(distances(rows, &StoredRow::data)) {}

protected:
    // Of the first row they lie at `first`.
    __m512i words(const uint8_t* first) const {
        return _mm512_i32gather_epi32(distances_, first, 1);
    }

private:
    const __m512i distances_;
};

// The scales, and leasts, of a format's runs, one after another.
template <class Format>
class ScalesOfTile;

template <class Format>
concept HasScale = requires { typename Format::Scale; };

// The blocks of GGUF files, whose scales are halves.
template <class Format>
    requires HasScale<Format> && std::is_same_v<typename Format::Scale, half>
class ScalesOfTile<Format> : public GatheredRows {
public:
    using GatheredRows::GatheredRows;

    // What is read lies in the block that begins with the numbers.
    template <class Place>
    void read(const Format& first, const Place& at, Vec& scales, Vec& leasts) const {
        const __m512i both = words(first.scale(at));
        scales = widened_halves(both);
        if (Format::kScaling == Scaling::kAndLeast) {
            leasts = widened_halves(_mm512_srli_epi32(both, 16));
        }
    }
};

// Scales of a row one after another: sixteen bytes of each row at a time.
template <class Format>
    requires HasScale<Format> && (!std::is_same_v<typename Format::Scale, half>)
class ScalesOfTile<Format> {
    using Scale = typename Format::Scale;

public:
    template <class Place>
    ScalesOfTile(const StoredRow (&rows)[kTileRows], const Place& at)
        : start_(Format(rows[0]).scale(at)),
          left_(count(rows[0]) * sizeof(Scale) - (start_ - rows[0].scales)) {
        for (int r = 0; r < kTileRows; ++r) rows_[r] = rows[r].scales + (start_ - rows[0].scales);
    }

    template <class Place>
    void read(const Format& first, const Place& at, Vec& scales, Vec&) {
        const auto place = static_cast<uint32_t>(first.scale(at) - start_);
        if (place >= end_) take(place);
        const __m512i word = _mm512_load_si512(words_[place % 16 / 4]);
        const __m512i shifted = _mm512_srlv_epi32(word, _mm512_set1_epi32(place % 4 * 8));
        if constexpr (std::is_same_v<Scale, bf16>) {
            scales = _mm512_castsi512_ps(_mm512_slli_epi32(shifted, 16));
        } else {
            scales = powers(_mm512_and_si512(shifted, _mm512_set1_epi32(255)));
        }
    }

private:
    // Of a row.
    static int64_t count(const StoredRow& row) { return (row.depth + row.group - 1) / row.group; }

    // Mxfp4's scale_to of these exponents.
    static Vec powers(__m512i exponents) {
        const __m512i powers_of_two = _mm512_sub_epi32(exponents, _mm512_set1_epi32(127));
        const Vec halves = _mm512_scalef_ps(splat(0.5f), _mm512_cvtepi32_ps(powers_of_two));
        const __mmask16 is_nan = _mm512_cmpeq_epi32_mask(exponents, _mm512_set1_epi32(255));
        return _mm512_mask_mov_ps(halves, is_nan, splat(__builtin_nanf("")));
    }

    void take(uint32_t place) {
        __m512i words[4];
        transpose([&](int r) { return rows_[r] + place; }, words, left_ - place);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) _mm512_store_si512(words_[i], words[i]);
        end_ = place + 16;
    }

    const uint8_t* const start_;
    const int64_t left_;  // bytes of a row's scales from there on
    uint32_t end_ = 0;    // of those in words_
    const uint8_t* rows_[kTileRows];
    alignas(64) uint8_t words_[4][64];
};

// Blocks of eight runs: d and dmin, then the factors that SixBitScales takes apart.
template <class Format>
    requires std::is_base_of_v<SixBitScales, Format>
class ScalesOfTile<Format> : public GatheredRows {
public:
    using GatheredRows::GatheredRows;

    template <class Place>
    void read(const Format& first, const Place& at, Vec& scales, Vec& leasts) {
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
        scales = mul(d_, _mm512_cvtepi32_ps(_mm512_and_si512(scale, six)));
        leasts = mul(minus_least_, _mm512_cvtepi32_ps(_mm512_and_si512(least, six)));
    }

private:
    void take(const uint8_t* block) {
        const __m512i both = words(block);
        d_ = widened_halves(both);
        minus_least_ = sub(splat(0.0f), widened_halves(_mm512_srli_epi32(both, 16)));
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
            packed_[i] = words(block + 4 + 4 * i);
        }
    }

    Vec d_, minus_least_;
    __m512i packed_[3];
};

// Blocks of eight runs: a signed byte for either half of each, and a d for all. `seconds`: the
// scales of the second halves.
template <class X>
class ScalesOfTile<Q6_K<X>> : public GatheredRows {
public:
    template <class Place>
    ScalesOfTile(const StoredRow (&rows)[kTileRows], const Place& at)
        : GatheredRows(rows, at), first_(rows[0].data) {
        for (int r = 0; r < kTileRows; ++r) rows_[r] = rows[r].data;
    }

    template <class Place>
    void read(const Q6_K<X>& first, const Place& at, Vec& scales, Vec& seconds) {
        if (at.enters) take(first.codes(at));
        // Of either run of a word: the bytes that come last are the upper ones.
        const __m512i pair = _mm512_sllv_epi32(_mm512_load_si512(factors_[at.run / 2]),
                                               _mm512_set1_epi32(at.run % 2 ? 0 : 16));
        seconds = mul(d_, _mm512_cvtepi32_ps(_mm512_srai_epi32(pair, 24)));
        const __m512i lower = _mm512_slli_epi32(pair, 8);
        scales = mul(d_, _mm512_cvtepi32_ps(_mm512_srai_epi32(lower, 24)));
    }

private:
    void take(const uint8_t* block) {
        // d is the upper half of the last four bytes.
        d_ = widened_halves(_mm512_srli_epi32(words(block + 206), 16));
        __m512i factors[4];
        transpose([&](int r) { return rows_[r] + (block - first_) + 192; }, factors);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) _mm512_store_si512(factors_[i], factors[i]);
    }

    const uint8_t* const first_;
    Vec d_;
    const uint8_t* rows_[kTileRows];
    alignas(64) uint8_t factors_[4][64];  // those of two runs in four bytes of a row
};

}  // namespace moesd::MOESD_ISA
