// The short blocks of GGUF files: scales in fp16 and codes of a run, side by side.
#pragma once

#include "stored_row.h"

namespace moesd::MOESD_ISA {

// Where a run lies whose block has `Bytes` and `Runs`.
template <int Bytes, int Runs = 1>
struct BlockPlace {
    int64_t block;       // bytes before it
    int run;             // of the block
    bool enters = true;  // another block than the place before

    BlockPlace(int64_t k, const StoredRow&)
        : block(k / (Runs * kRun) * Bytes), run(static_cast<int>(k / kRun % Runs)) {}

    void next() {
        enters = ++run == Runs;
        if (enters) run = 0, block += Bytes;
    }

    // Bytes of the block that the runs before this one take.
    int64_t passed() const { return run * (Bytes / Runs); }
};

// Rows of blocks, which begin at codes(place).
class Blocks {
public:
    explicit Blocks(const StoredRow& row) : blocks_(row.data) {}

    template <class Place>
    const uint8_t* codes(const Place& at) const {
        return blocks_ + at.block;
    }

private:
    const uint8_t* blocks_;
};

// Blocks that begin with fp16 d, the scale of their codes, and if S says so fp16 m, their least.
template <Scaling S>
class ScaledBlocks : public Blocks {
public:
    using Blocks::Blocks;

    static constexpr Scaling kScaling = S;
    using Scale = half;
    template <class Place>
    const uint8_t* scale(const Place& at) const {
        return codes(at);
    }
    template <class Place>
    void scale_to(const Place& at, float* scale, float* least) const {
        *scale = widened(load_at<half>(codes(at))), *least = 0.0f;
        if (S == Scaling::kAndLeast) *least = widened(load_at<half>(codes(at) + sizeof(half)));
    }

protected:
    template <class Place>
    Vec d(const Place& at) const {
        return splat(load_at<half>(codes(at)));
    }
    template <class Place>
    Vec m(const Place& at) const {
        return splat(load_at<half>(codes(at) + sizeof(half)));
    }
};

// d * q: fp16 d, then 32 signed bytes q.
template <class X>
class Q8_0 : public ScaledBlocks<Scaling::kOne> {
public:
    using Place = BlockPlace<34>;

    using ScaledBlocks::ScaledBlocks;

    void decode(const Place& at, X* out) { scale_run(packed(at), d(at), out); }

    static constexpr Packing kPacking = Packing::kBytes;
    static constexpr int kMiddle = 128;
    const uint8_t* packed(const Place& at) const { return codes(at) + sizeof(half); }
};

// d * (q - 8): fp16 d, then 16 bytes; byte i holds weight i in its low half and 16 + i in its high.
template <class X>
class Q4_0 : public ScaledBlocks<Scaling::kOne> {
public:
    using Place = BlockPlace<18>;

    using ScaledBlocks::ScaledBlocks;

    static constexpr const float (&kCodes)[16] = kMinus8To7;

    auto value(const Place& at) const {
        return [d = d(at)](Vec q) { return mul(d, q); };
    }

    template <class P>
    void look_up(const Place& at, const P& palette, X* out) const {
        palette.template look_up<Nibbles::kSplit>(packed(at), out);
    }

    static constexpr Packing kPacking = Packing::kSplit;
    static constexpr int kMiddle = 8;
    const uint8_t* packed(const Place& at) const { return codes(at) + sizeof(half); }
};

// d * q + m: fp16 d and m, then 16 bytes as in Q4_0.
template <class X>
class Q4_1 : public ScaledBlocks<Scaling::kAndLeast> {
public:
    using Place = BlockPlace<20>;

    using ScaledBlocks::ScaledBlocks;

    static constexpr const float (&kCodes)[16] = kZeroToFifteen;

    auto value(const Place& at) const {
        return [d = d(at), m = m(at)](Vec q) { return add(mul(d, q), m); };
    }

    template <class P>
    void look_up(const Place& at, const P& palette, X* out) const {
        palette.template look_up<Nibbles::kSplit>(packed(at), out);
    }

    static constexpr Packing kPacking = Packing::kSplit;
    static constexpr int kMiddle = 0;
    const uint8_t* packed(const Place& at) const { return codes(at) + 4; }
};

// The values of codes of five bits.
template <class X, class F>
inline TwoPalettes<X> thirty_two(const F& value) {
    const Levels low(kZeroToFifteen, value);
    const Levels high(kZeroToFifteen, [&](Vec q) { return value(add(q, splat(16.0f))); });
    return {low.of, high.of};
}

// Decodes codes that are bytes.
template <class X, class F>
inline void decode_bytes(const RunCodes& codes, const F& value, X* out) {
    const auto* const bytes = reinterpret_cast<const uint8_t*>(&codes);
#pragma GCC unroll 4
    for (int i = 0; i < kRun; i += 2 * kLanes) {
        store_pair(out + i, value(widen_bytes(bytes + i)), value(widen_bytes(bytes + i + kLanes)));
    }
}

// Decodes codes of five bits: sixteen bytes hold the lower four of a run as Q4_0's, and the bits of
// a word are the fifth.
template <class X, class F>
inline void decode_five_bits(const uint8_t* halves, uint32_t fifth, const F& value, X* out) {
    if constexpr (kHasTwoPalettes<X>) {
        thirty_two<X>(value).template look_up<Nibbles::kSplit>(halves, fifth, out);
    } else {
        using Fours = uint32_t __attribute__((vector_size(kRun)));
        using Eights = uint64_t __attribute__((vector_size(kRun)));
        const auto a = load_at<uint64_t>(halves), b = load_at<uint64_t>(halves + 8);
        const Eights lower = (Eights{a, b, a, b} >> Eights{0, 0, 4, 4}) & 0x0f0f0f0f0f0f0f0f;
        const Fours bits = fifth >> Fours{0, 4, 8, 12, 16, 20, 24, 28} & 15;
        // The product has each of four bits in a byte of its own, four places up.
        const Fours upper = bits * 0x02040810 & 0x10101010;
        decode_bytes((RunCodes)lower | (RunCodes)upper, value, out);
    }
}

// d * (q - 16): fp16 d, then the fifth bits and the sixteen bytes of q.
template <class X>
class Q5_0 : public ScaledBlocks<Scaling::kOne> {
public:
    using Place = BlockPlace<22>;

    using ScaledBlocks::ScaledBlocks;

    void decode(const Place& at, X* out) {
        const auto value = [d = d(at)](Vec q) { return mul(d, sub(q, splat(16.0f))); };
        decode_five_bits(packed(at), load_at<uint32_t>(upper(at)), value, out);
    }

    static constexpr Packing kPacking = Packing::kFiveBits;
    static constexpr int kMiddle = 16;
    const uint8_t* packed(const Place& at) const { return codes(at) + 6; }
    const uint8_t* upper(const Place& at) const { return codes(at) + 2; }
};

// d * q + m: fp16 d and m, then as Q5_0.
template <class X>
class Q5_1 : public ScaledBlocks<Scaling::kAndLeast> {
public:
    using Place = BlockPlace<24>;

    using ScaledBlocks::ScaledBlocks;

    void decode(const Place& at, X* out) {
        const auto value = [d = d(at), m = m(at)](Vec q) { return add(mul(d, q), m); };
        decode_five_bits(packed(at), load_at<uint32_t>(upper(at)), value, out);
    }

    static constexpr Packing kPacking = Packing::kFiveBits;
    static constexpr int kMiddle = 0;
    const uint8_t* packed(const Place& at) const { return codes(at) + 8; }
    const uint8_t* upper(const Place& at) const { return codes(at) + 4; }
};

}  // namespace moesd::MOESD_ISA
