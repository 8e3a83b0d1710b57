// Products of MXFP4 weights with very few tokens, of which tiles would multiply mostly zeros: in
// vectors with a weight row in each lane, by the codes as they lie; nothing is decoded, and a scale
// is applied to the sum of its 32 products.
//
// Invariance: the bits are those of tiles. A tile adds a step's products of even depths in one
// chain and those of odd depths in another, both from zero, and then their sum to what it held. A
// step is what shares a scale, and multiplying by a power of two changes no rounding as long as
// all numbers stay normal. Where that is not sure, tiles do it.
#pragma once

#include "decoders.h"
#include "../../kernels/for_size.h"
#include "../../kernels/int8/vnni/scales.h"

namespace moesd::MOESD_ISA {

constexpr int kLaneTokens = 2;       // three take as long on tiles
constexpr int64_t kLaneDepth = 128;  // codes of a row that are read together
constexpr int64_t kLaneSteps = kLaneDepth / kStepDepth;
// Exponents of activations and scales that may be taken: the least nonzero sum of products is a
// multiple of the least product's last bit, and so is it after the scale.
constexpr int kLaneExponents = 50, kScaleExponents = 40;

// A panel's first tokens in fp32, zeros beyond the depth; before them, whether all are zeros or
// numbers of those exponents.
struct LanePanel {
    int32_t* in_range;
    float* tokens[kLaneTokens];

    static constexpr int64_t kHeader = 64;  // bytes before the tokens, which stay aligned

    static int64_t padded(int64_t depth) {
        return (depth + kLaneDepth - 1) / kLaneDepth * kLaneDepth;
    }
    static int64_t bytes_of(int64_t depth) {
        return kHeader + kLaneTokens * padded(depth) * static_cast<int64_t>(sizeof(float));
    }

    LanePanel(const bf16* memory, int64_t depth)
        : in_range(reinterpret_cast<int32_t*>(const_cast<bf16*>(memory))) {
        auto* const first = reinterpret_cast<float*>(in_range + kHeader / sizeof(*in_range));
        for (int t = 0; t < kLaneTokens; ++t) tokens[t] = first + t * padded(depth);
    }
};

// Takes the first `count` tokens out of a panel's pairs, as pack_panel and transpose_pairs pack
// them.
inline void take_floats(const bf16* pairs, int64_t depth, int64_t count, const LanePanel& out) {
    bool in_range = true;
    for (int64_t t = 0; t < count; ++t) {
        auto* const numbers = reinterpret_cast<uint32_t*>(out.tokens[t]);
        for (int64_t k = 0; k < depth; ++k) {
            const uint32_t bits = uint32_t{pairs[k / 2 * 2 * kTile + 2 * t + k % 2].bits} << 16;
            const int exponent = static_cast<int>(bits >> 23 & 255) - 127;
            const bool known = exponent >= -kLaneExponents && exponent <= kLaneExponents;
            in_range = in_range && (known || bits << 1 == 0);
            numbers[k] = bits;
        }
        for (int64_t k = depth; k < LanePanel::padded(depth); ++k) numbers[k] = 0;
    }
    *out.in_range = in_range;
}

// The codes and scales of kLaneDepth weights of sixteen rows.
class LaneWeights {
public:
    explicit LaneWeights(const StoredRow (&rows)[kTile])
        : rows_(rows), to_scales_(distances(rows, &StoredRow::scales)) {}

    // Weights from k on, of which `left` are there; beyond them codes are zero, and scales one.
    void read(int64_t k, int64_t left) {
        const __mmask16 valid =
            left < kLaneDepth ? static_cast<__mmask16>((1u << left / 8) - 1) : 0xffff;
        __m512i codes[kTile];
#pragma GCC unroll 16
        for (int r = 0; r < kTile; ++r) {
            const uint8_t* const row = rows_[r].data + k / 2;
            codes[r] = _mm512_maskz_loadu_epi32(valid, row);
            __builtin_prefetch(row + kCodesAhead);
        }
        transpose16(codes, eights_);
        exponents_ = left < kLaneDepth
                         ? last_exponents(k / kRun, left / kRun)
                         : _mm512_i32gather_epi32(to_scales_, rows_[0].scales + k / kRun, 1);
        const __m512i least = _mm512_set1_epi8(127 - kScaleExponents);
        const __m512i above = _mm512_sub_epi8(exponents_, least);
        too_far_ |= _mm512_cmpgt_epu8_mask(above, _mm512_set1_epi8(2 * kScaleExponents));
    }

    // Whether all scales so far were in range.
    bool in_range() const { return too_far_ == 0; }

    // The numbers of depth 8 * i + j from the k that was read; a look-up takes four bits.
    Vec numbers(int64_t i, int j) const {
        return _mm512_permutexvar_ps(_mm512_srli_epi32(eights_[i], 4 * j),
                                     load(Mxfp4<float>::kCodes));
    }

    Vec scales(int step) const {
        const __m512i exponents = _mm512_srli_epi32(exponents_, 8 * step);
        return _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_and_si512(exponents, _mm512_set1_epi32(255)), 23));
    }

private:
    __m512i last_exponents(int64_t first, int64_t count) const {
        alignas(64) uint8_t bytes[kTile][kLaneSteps];
        std::memset(bytes, 127, sizeof(bytes));
        for (int r = 0; r < kTile; ++r) std::memcpy(bytes[r], rows_[r].scales + first, count);
        return _mm512_load_si512(bytes);
    }

    const StoredRow (&rows_)[kTile];
    const __m512i to_scales_;
    __m512i exponents_;
    alignas(64) __m512i eights_[kTile];  // [i]: eight codes of each row
    __mmask64 too_far_ = 0;
};

// The sums of sixteen rows with the first T tokens of a panel, as a tile holds them; false where
// they might not be what tiles give.
template <int T>
__attribute__((noinline)) bool lanes_product(const StoredRow (&rows)[kTile], const LanePanel& panel,
                                             int64_t depth, PrefetchStreams& prefetch,
                                             float* sums) {
    constexpr int kChains = 2;  // steps at a time: a chain alone waits for its own sums
    LaneWeights weights(rows);
    Vec total[T];
    for (int t = 0; t < T; ++t) total[t] = splat(0.0f);
    for (int64_t k = 0; k < depth; k += kLaneDepth) {
        weights.read(k, depth - k);
#pragma GCC unroll 2
        for (int step = 0; step < kLaneSteps; step += kChains) {
            for (int i = 0; i < kChains; ++i) prefetch.fetch();
            Vec even[kChains][T], odd[kChains][T];
#pragma GCC unroll 32
            for (int d = 0; d < kStepDepth; ++d) {
#pragma GCC unroll 2
                for (int chain = 0; chain < kChains; ++chain) {
                    const int at = (step + chain) * kStepDepth + d;
                    const Vec w = weights.numbers(at / 8, at % 8);
#pragma GCC unroll 2
                    for (int t = 0; t < T; ++t) {
                        const Vec x = splat(panel.tokens[t][k + at]);
                        Vec& sum = d % 2 == 0 ? even[chain][t] : odd[chain][t];
                        sum = d < 2 ? mul(w, x) : fma(w, x, sum);
                    }
                }
            }
#pragma GCC unroll 2
            for (int chain = 0; chain < kChains; ++chain) {
                const Vec scales = weights.scales(step + chain);
#pragma GCC unroll 2
                for (int t = 0; t < T; ++t) {
                    total[t] = add(total[t], mul(add(even[chain][t], odd[chain][t]), scales));
                }
            }
        }
    }
    std::memset(sums, 0, kTileSums * sizeof(float));
    for (int t = 0; t < T; ++t) {
        alignas(64) float by_row[kTile];
        store(by_row, total[t]);
        for (int r = 0; r < kTile; ++r) sums[r * kTile + t] = by_row[r];
    }
    return weights.in_range();
}

}  // namespace moesd::MOESD_ISA
