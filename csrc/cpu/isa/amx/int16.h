// Activations as integers of sixteen bits, for weights of eight bits with one scale for a row: two
// products of bytes, which are exact, and nothing is decoded. A row's integers are multiples of a
// power of two: activations of 2^-7 of the row's largest or more are exact, others off by 2^-15 of
// it at most.
//
// Source: products in floating point from those of integers, the Ozaki scheme (Ootomo, Ozaki and
// Yokota 2024, "DGEMM on integer matrix multiplication unit").
//
// Invariance: an output is made of two exact integers and both scales, whatever else tiles hold.
#pragma once

#include "tiles.h"
#include "../../kernels/formats/decoders.h"

namespace moesd::MOESD_ISA {

// A panel's integers, by four of the depth: the upper bytes of each token's four, then the lower
// ones, which have no sign; before them, the tokens' powers of two.
struct Int16Panel {
    float* scales;
    uint8_t* bytes;

    static constexpr int64_t kFour = kTile * 4;  // bytes of four of the depth
    static constexpr int64_t kRow = 2 * kFour;
    static constexpr int64_t kStep = 64;  // of the depth, that a tile holds
    static constexpr int64_t kStepBytes = kStep / 4 * kRow;

    static int64_t bytes_of(int64_t depth) {
        return kTile * sizeof(float) + (depth + kStep - 1) / kStep * kStepBytes;
    }

    explicit Int16Panel(const bf16* memory)
        : scales(reinterpret_cast<float*>(const_cast<bf16*>(memory))),
          bytes(reinterpret_cast<uint8_t*>(scales + kTile)) {}
};

// The powers of two of sixteen rows. That of a row that holds a number that is not finite is not a
// number.
struct PowersOfTwo {
    Vec scale, inverse;

    // `largest`: the bits of each row's largest magnitude, of 2^14 or more times the scale.
    explicit PowersOfTwo(__m512i largest) {
        constexpr int kBits = 14, kInfinite = 255;
        const __m512i bits = _mm512_srli_epi32(largest, 23);
        const __mmask16 finite = _mm512_cmplt_epi32_mask(bits, _mm512_set1_epi32(kInfinite));
        // Scales and their inverses are normal numbers.
        const __m512i exponent = _mm512_max_epi32(bits, _mm512_set1_epi32(kBits + 1));
        const auto power = [](__m512i e) { return _mm512_castsi512_ps(_mm512_slli_epi32(e, 23)); };
        const __m512i nan = _mm512_set1_epi32(0x7fc00000);
        scale = _mm512_mask_mov_ps(_mm512_castsi512_ps(nan), finite,
                                   power(_mm512_sub_epi32(exponent, _mm512_set1_epi32(kBits))));
        inverse = _mm512_maskz_mov_ps(
            finite, power(_mm512_sub_epi32(_mm512_set1_epi32(2 * 127 + kBits), exponent)));
    }
};

// Makes integers of a panel's pairs, as pack_panel and transpose_pairs pack them; the depth is a
// multiple of kRun.
inline void take_integers(const bf16* panel_pairs, int64_t depth, const Int16Panel& out) {
    const auto* pairs = reinterpret_cast<const __m512i*>(panel_pairs);
    auto* bytes = reinterpret_cast<__m512i*>(out.bytes);
    const __m512i odd = _mm512_set1_epi32(~0xffff), magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < depth / 2; ++i) {
        const __m512i pair = _mm512_load_si512(pairs + i);
        const __m512i first = _mm512_and_si512(_mm512_slli_epi32(pair, 16), magnitude);
        const __m512i second = _mm512_and_si512(pair, _mm512_and_si512(odd, magnitude));
        largest = _mm512_max_epi32(largest, _mm512_max_epi32(first, second));
    }
    const PowersOfTwo powers(largest);
    store(out.scales, powers.scale);
    const auto integers = [&](__m512i bits) {
        return _mm512_cvtps_epi32(mul(_mm512_castsi512_ps(bits), powers.inverse));
    };
    const __m512i low = _mm512_set1_epi32(0xff), second = _mm512_set1_epi32(0xff00);
    for (int64_t i = 0; i < depth / 2; i += 2, bytes += 2) {
        __m512i upper[2], lower[2];  // of two of the depth each, in a lane's lower half
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m512i pair = _mm512_load_si512(pairs + i + half);
            const __m512i a = integers(_mm512_slli_epi32(pair, 16));
            const __m512i b = integers(_mm512_and_si512(pair, odd));
            upper[half] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(a, 8), low),
                                          _mm512_and_si512(b, second));
            lower[half] = _mm512_or_si512(_mm512_and_si512(a, low),
                                          _mm512_and_si512(_mm512_slli_epi32(b, 8), second));
        }
        _mm512_store_si512(bytes, _mm512_or_si512(upper[0], _mm512_slli_epi32(upper[1], 16)));
        _mm512_store_si512(bytes + 1, _mm512_or_si512(lower[0], _mm512_slli_epi32(lower[1], 16)));
    }
    const __m512i zero = _mm512_setzero_si512();
    for (int64_t k = depth; k % Int16Panel::kStep != 0; k += 4, bytes += 2) {
        _mm512_store_si512(bytes, zero), _mm512_store_si512(bytes + 1, zero);
    }
}

// Tile w * T + t of `sums` = rows[w] times panels[t], for W * T <= 2. `whole`: whether all rows
// lie one as far from the next as all others; else missing ones are copies of the last.
template <int W, int T>
__attribute__((noinline)) void int16_product(const StoredRow* const (&rows)[W], bool whole,
                                             const bf16* const (&panels)[T], int64_t depth,
                                             PrefetchStreams& prefetch, float* sums) {
    static_assert(W * T <= 2);
    constexpr int64_t kStep = Int16Panel::kStep;
    const int64_t stride = rows[0][1].data - rows[0][0].data;
    const uint8_t* bytes[T];
    for (int t = 0; t < T; ++t) bytes[t] = Int16Panel(panels[t]).bytes;
    const auto multiply = [&]<int I>() {
        tile_multiply_signed<2 * I, 4 + I / T, 6>(), tile_multiply_bytes<2 * I + 1, 4 + I / T, 7>();
    };
    const auto load_panel = [&](int t) {
        tile_load<6>(bytes[t], Int16Panel::kRow);
        tile_load<7>(bytes[t] + Int16Panel::kFour, Int16Panel::kRow);
        bytes[t] += Int16Panel::kStepBytes;
    };
    for_tiles<2 * W * T>([]<int I>() { tile_zero<I>(); });
    for (int64_t k = 0; k < depth; k += kStep) {
        const bool lie = whole && k + kStep <= depth;
        for_tiles<W>([&]<int I>() {
            prefetch.fetch(), prefetch.fetch();  // as often as products of bf16 do
            if (lie) {
                tile_load<4 + I>(rows[I][0].data + k, stride);
            } else {
                alignas(64) uint8_t edge[kTile * kStep];
                const __mmask64 valid =
                    depth - k < kStep ? (uint64_t{1} << (depth - k)) - 1 : ~0ull;
                for (int r = 0; r < kTile; ++r) {
                    _mm512_store_si512(edge + r * kStep,
                                       _mm512_maskz_loadu_epi8(valid, rows[I][r].data + k));
                }
                tile_load<4 + I>(edge, kStep);
            }
        });
        for_tiles<T>([&]<int P>() {
            load_panel(P);
            for_tiles<W>([&]<int I>() { multiply.template operator()<I * T + P>(); });
        });
    }
    for_tiles<W * T>([&]<int I>() {
        alignas(64) int32_t upper[kTileSums], lower[kTileSums];
        tile_store<2 * I>(upper, kTile * 4), tile_store<2 * I + 1>(lower, kTile * 4);
        const Vec by_token = load(Int16Panel(panels[I % T]).scales);
        float* out = sums + I * kTileSums;
        for (int n = 0; n < kTile; ++n) {
            const Vec u = _mm512_cvtepi32_ps(_mm512_load_si512(upper + n * kTile));
            const Vec l = _mm512_cvtepi32_ps(_mm512_load_si512(lower + n * kTile));
            const Vec by_row = splat(load_at<bf16>(rows[I / T][n].scales));
            store(out + n * kTile, mul(mul(fma(u, splat(256.0f), l), by_token), by_row));
        }
    });
}

}  // namespace moesd::MOESD_ISA
