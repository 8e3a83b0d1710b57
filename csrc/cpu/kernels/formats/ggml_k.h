// The long blocks of GGUF files: eight runs, whose scales have few bits.
#pragma once

#include "ggml.h"

namespace moesd::MOESD_ISA {

using Words = uint16_t __attribute__((vector_size(kRun)));  // of codes; shifts are one instruction

// The scales and minima of Q4_K's and Q5_K's blocks, which begin with fp16 d and dmin and 12 bytes
// of a 6-bit s and m for each of eight runs: d * s and dmin * m.
class SixBitScales : public Blocks {
public:
    using Blocks::Blocks;

    static constexpr Scaling kScaling = Scaling::kAndLeast;
    template <class Place>
    void scale_to(const Place& at, float* scale, float* least) {
        if (at.enters) take_scales(codes(at));
        *scale = scales_[at.run], *least = -minima_[8 + at.run];
    }

protected:
    // What codes of a run stand for.
    template <class Place>
    auto values(const Place& at) {
        if (at.enters) take_scales(codes(at));
        const Vec scale = splat(scales_[at.run]), minimum = splat(minima_[8 + at.run]);
        return [=](Vec q) { return sub(mul(scale, q), minimum); };
    }

private:
    // The first four runs have bytes of their own, of which the two upper bits serve the last four.
    void take_scales(const uint8_t* block) {
        const uint8_t* packed = block + 4;
        const auto s = load_at<uint32_t>(packed), m = load_at<uint32_t>(packed + 4);
        const auto last = load_at<uint32_t>(packed + 8);
        constexpr uint32_t kSix = 0x3f3f3f3f, kLower = 0x0f0f0f0f, kUpper = 0x30303030;
        const uint32_t factors[4] = {s & kSix, (last & kLower) | (s >> 2 & kUpper), m & kSix,
                                     (last >> 4 & kLower) | (m >> 2 & kUpper)};
        uint8_t bytes[16];
        std::memcpy(bytes, factors, sizeof(bytes));
        const Vec d = splat(load_at<half>(block)), least = splat(load_at<half>(block + 2));
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += kLanes) {  // of either product one half is used
            const Vec factor = widen_bytes(bytes + i);
            store(scales_ + i, mul(d, factor)), store(minima_ + i, mul(least, factor));
        }
    }

    alignas(64) float scales_[16], minima_[16];
};

// d * s * q - dmin * m, in blocks of 256: fp16 d and dmin, 12 bytes of a 6-bit s and m for each of
// eight runs, 128 bytes of codes; 32 bytes hold one run in their low halves and the next in their
// high ones.
template <class X>
class Q4_K : public SixBitScales {
public:
    using Place = BlockPlace<144, 8>;

    using SixBitScales::SixBitScales;

    static constexpr const float (&kCodes)[16] = kZeroToFifteen;

    auto value(const Place& at) { return values(at); }

    template <class P>
    void look_up(const Place& at, const P& palette, X* out) const {
        if (at.run % 2 == 0) palette.template look_up<Nibbles::kLow>(packed(at), out);
        else palette.template look_up<Nibbles::kHigh>(packed(at), out);
    }

    static constexpr Packing kPacking = Packing::kAlternating;
    static constexpr int kMiddle = 0;
    const uint8_t* packed(const Place& at) const { return codes(at) + 16 + at.run / 2 * kRun; }
};

// d * s * q - dmin * m, in blocks of 256: d, dmin, s and m as in Q4_K, 32 bytes with the fifth bits
// of q, run r's in bit r, then its lower four as in Q4_K.
template <class X>
class Q5_K : public SixBitScales {
public:
    using Place = BlockPlace<176, 8>;

    using SixBitScales::SixBitScales;

    void decode(const Place& at, X* out) {
        const auto value = values(at);
        if constexpr (kHasTwoPalettes<X>) {
            const TwoPalettes<X> numbers = thirty_two<X>(value);
            const uint32_t fifth = numbers.bit_of(upper(at), at.run);
            if (at.run % 2 == 0) numbers.template look_up<Nibbles::kLow>(packed(at), fifth, out);
            else numbers.template look_up<Nibbles::kHigh>(packed(at), fifth, out);
        } else {
            Words lower, fifth;
            std::memcpy(&lower, packed(at), kRun), std::memcpy(&fifth, upper(at), kRun);
            const Words q = (lower >> at.run % 2 * 4 & 0x0f0f) | (fifth >> at.run & 0x0101) << 4;
            decode_bytes((RunCodes)q, value, out);
        }
    }

    static constexpr Packing kPacking = Packing::kFiveBitsOfBlock;
    static constexpr int kMiddle = 0;
    const uint8_t* packed(const Place& at) const { return codes(at) + 48 + at.run / 2 * kRun; }
    const uint8_t* upper(const Place& at) const { return codes(at) + 16; }
};

// d * s * (q - 32), in blocks of 256: 128 bytes of lower halves of q, 64 of its upper two bits, 16
// of s, a signed byte for each sixteen weights, fp16 d. Either half of the block has 64 and 32 of
// those bytes: its four runs take the low halves of the first 32, of the second, their high halves,
// and bits 0-1, 2-3, 4-5 and 6-7 of the upper ones.
template <class X>
class Q6_K : public Blocks {
public:
    using Place = BlockPlace<210, 8>;

    using Blocks::Blocks;

    void decode(const Place& at, X* out) {
        if (at.enters) take(codes(at));
        const uint8_t* codes = codes_ + at.run * kRun;
        const Vec scales[2] = {splat(scales_[2 * at.run]), splat(scales_[2 * at.run + 1])};
#pragma GCC unroll 4
        for (int i = 0; i < kRun; i += 2 * kLanes) {
            store_pair(out + i, mul(widen_bytes(codes + i), scales[i / 16]),
                       mul(widen_bytes(codes + i + kLanes), scales[(i + kLanes) / 16]));
        }
    }

    static constexpr Packing kPacking = Packing::kSixBits;
    static constexpr int kMiddle = 32;
    static constexpr Scaling kScaling = Scaling::kHalves;
    const uint8_t* packed(const Place& at) const { return codes(at) + at.run / 4 * 64; }
    const uint8_t* upper(const Place& at) const { return codes(at) + 128 + at.run / 4 * kRun; }
    void scale_to(const Place& at, float* first, float* second) const {
        const uint8_t* const block = codes(at);
        const float d = widened(load_at<half>(block + 208));
        const uint8_t* const factors = block + 192 + 2 * at.run;
        *first = d * load_at<int8_t>(factors), *second = d * load_at<int8_t>(factors + 1);
    }

private:
    void take(const uint8_t* block) {
        const Vec d = splat(load_at<half>(block + 208));
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += kLanes) {
            store(scales_ + i, mul(d, widen_bytes(block + 192 + i)));
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            Words upper;
            std::memcpy(&upper, block + 128 + half * kRun, kRun);
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                Words lower;
                std::memcpy(&lower, block + (2 * half + i) * kRun, kRun);
                const Words first = (lower & 0x0f0f) | (upper << (4 - 2 * i) & 0x3030);
                const Words second = (lower >> 4 & 0x0f0f) | (upper >> 2 * i & 0x3030);
                const RunCodes codes[2] = {(RunCodes)first - 32, (RunCodes)second - 32};
                std::memcpy(codes_ + (4 * half + i) * kRun, &codes[0], kRun);
                std::memcpy(codes_ + (4 * half + 2 + i) * kRun, &codes[1], kRun);
            }
        }
    }

    alignas(64) float scales_[16];
    alignas(64) uint8_t codes_[8 * kRun];  // q - 32
};

}  // namespace moesd::MOESD_ISA
