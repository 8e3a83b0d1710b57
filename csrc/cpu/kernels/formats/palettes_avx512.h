// Look-ups of weights by their codes, with AVX-512; a part of vec_avx512.h.
#pragma once

namespace moesd::MOESD_ISA {

// Words that hold thirty-two codes of four bits in the order of their weights, with other bits
// above them.
template <Nibbles N>
inline __m512i nibbles(const uint8_t* codes) {
    if constexpr (N == Nibbles::kLow || N == Nibbles::kHigh) {
        const __m512i words =
            _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
        return N == Nibbles::kHigh ? _mm512_srli_epi16(words, 4) : words;
    }
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    if constexpr (N == Nibbles::kAdjacent) {  // a byte in the lower word, and shifted in the upper
        const __m512i lower = _mm512_cvtepu8_epi32(bytes);
        return _mm512_or_si512(lower, _mm512_slli_epi32(lower, 12));
    }
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(bytes));
    return _mm512_mask_srli_epi16(words, 0xffff0000, words, 4);
}

// Sixteen numbers, rounded to W, by a code of four bits; twice, so that a fifth bit changes
// nothing.
template <class W>
class Palette {
public:
    Palette() = default;
    explicit Palette(const Vec (&v)[1]) {
        static_assert(sizeof(W) == 2);
        alignas(64) W numbers[32];
        store_pair(numbers, v[0], v[0]);
        numbers_ = _mm512_load_si512(numbers);
    }

    // The numbers of thirty-two codes.
    template <Nibbles N>
    void look_up(const uint8_t* codes, W* out) const {
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(nibbles<N>(codes), numbers_));
    }

private:
    __m512i numbers_;
};

template <>
class Palette<float> {
public:
    Palette() = default;
    explicit Palette(const Vec (&v)[1]) : numbers_(v[0]) {}

    template <Nibbles N>
    void look_up(const uint8_t* codes, float* out) const {
        const __m512i words = nibbles<N>(codes);
        const __m256i first = _mm512_castsi512_si256(words);
        const __m256i last = _mm512_extracti64x4_epi64(words, 1);
        store(out, _mm512_permutexvar_ps(_mm512_cvtepu16_epi32(first), numbers_));
        store(out + kLanes, _mm512_permutexvar_ps(_mm512_cvtepu16_epi32(last), numbers_));
    }

private:
    Vec numbers_;
};

// One of two palettes that share a register: the fifth bit of a look-up says which.
template <class W, bool Second>
class HalfOfPalettes {
public:
    explicit HalfOfPalettes(__m512i both) : numbers_(both) {}

    template <Nibbles N>
    void look_up(const uint8_t* codes, W* out) const {
        const __m512i words = nibbles<N>(codes);
        const __m512i places = Second ? _mm512_or_si512(words, _mm512_set1_epi16(16))
                                      : _mm512_and_si512(words, _mm512_set1_epi16(15));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(places, numbers_));
    }

private:
    __m512i numbers_;
};

// Two palettes, for what it takes to round one.
template <class W>
struct TwoPalettes {
    HalfOfPalettes<W, false> first;
    HalfOfPalettes<W, true> second;

    TwoPalettes(const Vec (&a)[1], const Vec (&b)[1]) : TwoPalettes(rounded(a[0], b[0])) {}

    // As one, by codes whose fifth bits are those of a word.
    template <Nibbles N>
    void look_up(const uint8_t* codes, uint32_t fifth, W* out) const {
        const __m512i four = _mm512_and_si512(nibbles<N>(codes), _mm512_set1_epi16(15));
        const __m512i places = _mm512_mask_add_epi16(four, fifth, four, _mm512_set1_epi16(16));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(places, both_));
    }

    // A bit of each of thirty-two bytes.
    static uint32_t bit_of(const uint8_t* bytes, int bit) {
        const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
        return _mm256_test_epi8_mask(all, _mm256_set1_epi8(static_cast<char>(1 << bit)));
    }

private:
    explicit TwoPalettes(__m512i both) : first(both), second(both), both_(both) {}

    static __m512i rounded(Vec a, Vec b) {
        alignas(64) W numbers[32];
        store_pair(numbers, a, b);
        return _mm512_load_si512(numbers);
    }

    __m512i both_;
};
template <class W>
constexpr bool kHasTwoPalettes = sizeof(W) == 2;

// The numbers of a code of seven bits, rounded to W, which an eighth bit negates.
template <class W>
class SignedPalette {
public:
    explicit SignedPalette(const Vec (&v)[8]) {
        static_assert(sizeof(W) == 2);
        alignas(64) W numbers[128];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            store_pair(numbers + 32 * i, v[2 * i], v[2 * i + 1]);
            numbers_[i] = _mm512_load_si512(numbers + 32 * i);
        }
    }

    // The numbers of thirty-two codes.
    void look_up(const uint8_t* codes, W* out) const {
        const __m512i words =
            _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
        const __m512i low = _mm512_permutex2var_epi16(numbers_[0], words, numbers_[1]);
        const __m512i high = _mm512_permutex2var_epi16(numbers_[2], words, numbers_[3]);
        const __mmask32 is_high = _mm512_test_epi16_mask(words, _mm512_set1_epi16(64));
        const __m512i numbers = _mm512_mask_blend_epi16(is_high, low, high);
        const __m512i sign = _mm512_set1_epi16(static_cast<int16_t>(0x8000));
        constexpr int kAXorBAndC = 0x78;
        _mm512_storeu_si512(out, _mm512_ternarylogic_epi32(numbers, words, sign, kAXorBAndC));
    }

private:
    __m512i numbers_[4];
};
template <class W>
constexpr bool kHasSignedPalette = sizeof(W) == 2;

}  // namespace moesd::MOESD_ISA
