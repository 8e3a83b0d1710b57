// mxfp4 and fp8_block: small floating-point numbers with a scale.
#pragma once

#include "stored_row.h"

namespace moesd::MOESD_ISA {

struct RunPlace {
    int64_t k;

    RunPlace(int64_t weight, const StoredRow&) : k(weight) {}
    void next() { k += kRun; }
};

// E2M1 numbers, the fourth bit the sign; two in a byte, the low half first, and for each run a
// power of two, 2^(s - 127), of which 255 is NaN.
template <class X>
class Mxfp4 {
public:
    using Place = RunPlace;

    explicit Mxfp4(const StoredRow& row) : codes_(row.data), scales_(row.scales) {}

    const uint8_t* codes(const Place& at) const { return codes_ + at.k / 2; }

    alignas(64) static constexpr float kCodes[16] = {0,     0.5f,  1,  1.5f,  2,  3,  4,  6,
                                                     -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

    auto value(const Place& at) const {
        const Vec scale = splat(power(scales_[at.k / kRun]));
        return [=](Vec number) { return mul(number, scale); };
    }

    template <class P>
    void look_up(const Place& at, const P& palette, X* out) const {
        palette.template look_up<Nibbles::kAdjacent>(codes(at), out);
    }

    static constexpr Packing kPacking = Packing::kAdjacent;
    // Twice the numbers are integers; and twelve more, not negative.
    alignas(16) static constexpr uint8_t kIntegers[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                          12, 11, 10, 9,  8,  6,  4,  0};
    static constexpr int kMiddle = 12;
    static constexpr Scaling kScaling = Scaling::kOne;
    using Scale = uint8_t;  // the exponent
    const uint8_t* packed(const Place& at) const { return codes(at); }
    const uint8_t* scale(const Place& at) const { return scales_ + at.k / kRun; }
    void scale_to(const Place& at, float* scale, float* least) const {
        *scale = 0.5f * power(*this->scale(at)), *least = 0.0f;
    }

private:
    static float power(uint8_t s) {
        uint32_t bits = uint32_t{s} << 23;
        // The least has no exponent that is normal in fp32; 255 needs a mantissa that is not zero.
        if (__builtin_expect(s == 0 || s == 255, 0)) bits = s == 0 ? 0x00400000 : 0x7fc00000;
        float scale;
        std::memcpy(&scale, &bits, sizeof(scale));
        return scale;
    }

    const uint8_t *codes_, *scales_;
};

// E4M3 numbers times a scale.
template <class X, bool Palette = kHasSignedPalette<X>>
class ScaledE4m3 {
public:
    explicit ScaledE4m3(float scale) : scale_(splat(scale)) {}

    void decode(const uint8_t* codes, X* out) const {
#pragma GCC unroll 4
        for (int i = 0; i < kRun; i += 2 * kLanes) {
            Vec a, b;
            widen_e4m3(codes + i, a, b);
            store_pair(out + i, mul(a, scale_), mul(b, scale_));
        }
    }

private:
    Vec scale_;
};

// Those that are not negative, times the scale, are looked up.
template <class X>
class ScaledE4m3<X, true> {
public:
    explicit ScaledE4m3(float scale) : palette_(scaled(splat(scale))) {}

    void decode(const uint8_t* codes, X* out) const { palette_.look_up(codes, out); }

private:
    struct Numbers {
        alignas(64) float of[128];

        constexpr Numbers() : of() {
            for (int code = 0; code < 127; ++code) {
                const int exponent = code / 8, fraction = code % 8;
                of[code] = exponent == 0 ? fraction / 512.0f : (8 + fraction) / 1024.0f;
                for (int i = 1; i <= exponent; ++i) of[code] *= 2;
            }
            of[127] = __builtin_nanf("");
        }
    };
    static constexpr Numbers kNumbers{};

    static SignedPalette<X> scaled(Vec scale) {
        Vec values[128 / kLanes];
#pragma GCC unroll 8
        for (int i = 0; i < 128 / kLanes; ++i) {
            values[i] = mul(load(kNumbers.of + i * kLanes), scale);
        }
        return SignedPalette<X>(values);
    }

    SignedPalette<X> palette_;
};

// E4M3 numbers times the fp32 scale of their square; a row may end within a run.
template <class X>
class Fp8Block {
    static constexpr int64_t kSquare = 128;

public:
    // Most rows that are read together are in the square of the first.
    struct Place {
        int64_t k;
        const int64_t depth;
        const uint8_t* const scales;
        ScaledE4m3<X> numbers;

        Place(int64_t weight, const StoredRow& row)
            : k(weight), depth(row.depth), scales(row.scales), numbers(scale(scales)) {}

        void next() {
            k += kRun;
            if (k % kSquare == 0) numbers = ScaledE4m3<X>(scale(scales));
        }

        // Of the row's square here; past the depth there is none.
        float scale(const uint8_t* row_scales) const {
            return k < depth ? load_at<float>(row_scales + k / kSquare * sizeof(float)) : 0.0f;
        }
    };

    explicit Fp8Block(const StoredRow& row) : codes_(row.data), scales_(row.scales) {}

    const uint8_t* codes(const Place& at) const { return codes_ + at.k; }

    void decode(const Place& at, X* out) const {
        if (at.k + kRun <= at.depth) return decode(at, codes(at), out);
        const int64_t left = at.k < at.depth ? at.depth - at.k : 0;
        uint8_t last[kRun] = {};
        for (int64_t i = 0; i < left; ++i) last[i] = uncalled(codes(at)[i]);
        decode(at, last, out);
        // A scale that is not finite makes no number of the zeros.
        for (int64_t i = left; i < kRun; ++i) out[i] = uncalled(X{});
    }

    const uint8_t* scales() const { return scales_; }

private:
    // Keeps a loop from becoming a call: sums in registers would be spilled at every run for it.
    template <class T>
    static T uncalled(T value) {
        asm volatile("" ::: "memory");
        return value;
    }

    void decode(const Place& at, const uint8_t* codes, X* out) const {
        if (scales_ == at.scales) at.numbers.decode(codes, out);
        else ScaledE4m3<X, false>(at.scale(scales_)).decode(codes, out);
    }

    const uint8_t *codes_, *scales_;
};

}  // namespace moesd::MOESD_ISA
