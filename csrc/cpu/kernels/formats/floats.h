// mxfp4 and fp8_block: small floating-point numbers with a scale.
#pragma once

#include "stored_row.h"

namespace moesd::MOESD_ISA {

struct RunPlace {
    int64_t k;

    RunPlace(int64_t weight, const StoredRow&) : k(weight) {}
    void next() { k += kRun; }
};

// E2M1 numbers, the fourth bit the sign; two in a byte, the low half first, and for each run a power
// of two, 2^(s - 127), of which 255 is NaN.
template <class X>
class Mxfp4 {
public:
    using Place = RunPlace;

    explicit Mxfp4(const StoredRow& row) : codes_(row.data), scales_(row.scales) {}

    const uint8_t* codes(const Place& at) const { return codes_ + at.k / 2; }

    void decode(const Place& at, X* out) {
        const Vec scale = splat(power(scales_[at.k / kRun]));
        palette_of<X>(kE2M1, [=](Vec value) {
            return mul(value, scale);
        }).template look_up<Nibbles::kAdjacent>(codes_ + at.k / 2, out);
    }

private:
    alignas(64) static constexpr float kE2M1[16] = {0,     0.5f,  1,  1.5f,  2,  3,  4,  6,
                                                    -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

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

// E4M3 numbers times the fp32 scale of their square; a row may end within a run.
template <class X>
class Fp8Block {
public:
    using Place = RunPlace;

    explicit Fp8Block(const StoredRow& row)
        : codes_(row.data), scales_(row.scales), whole_(row.depth / kRun * kRun) {
        if (whole_ < row.depth) std::memcpy(last_, codes_ + whole_, row.depth - whole_);
    }

    const uint8_t* codes(const Place& at) const { return codes_ + at.k; }

    void decode(const Place& at, X* out) {
        const Vec scale = splat(load_at<float>(scales_ + at.k / kSquare * sizeof(float)));
        const uint8_t* codes = at.k < whole_ ? codes_ + at.k : last_;
#pragma GCC unroll 4
        for (int i = 0; i < kRun; i += 2 * kLanes) {
            Vec a, b;
            widen_e4m3(codes + i, a, b);
            store_pair(out + i, mul(a, scale), mul(b, scale));
        }
    }

private:
    static constexpr int64_t kSquare = 128;

    const uint8_t *codes_, *scales_;
    const int64_t whole_;      // weights of whole runs
    uint8_t last_[kRun] = {};  // those after them
};

}  // namespace moesd::MOESD_ISA
