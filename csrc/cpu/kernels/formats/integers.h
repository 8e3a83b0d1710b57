// int8 and int4: signed integers in groups that share a scale in bf16.
#pragma once

#include "stored_row.h"

namespace moesd::MOESD_ISA {

struct GroupPlace {
    int64_t k, scale;  // of the weights, and of their scale in bytes
    int64_t group, left;
    bool enters = true;  // another group than the place before

    // Groups are powers of two, and a division takes as long as some runs.
    GroupPlace(int64_t weight, const StoredRow& row)
        : k(weight),
          scale((weight >> __builtin_ctzll(row.group)) * sizeof(bf16)),
          group(row.group),
          left(row.group - (weight & (row.group - 1))) {}

    void next() {
        k += kRun, left -= kRun, enters = left == 0;
        if (enters) left = group, scale += sizeof(bf16);
    }
};

template <class X>
class Int8 {
public:
    using Place = GroupPlace;

    explicit Int8(const StoredRow& row) : codes_(row.data), scales_(row.scales) {}

    const uint8_t* codes(const Place& at) const { return codes_ + at.k; }

    void decode(const Place& at, X* out) {
        scale_run(codes_ + at.k, splat(load_at<bf16>(scales_ + at.scale)), out);
    }

    static constexpr Packing kPacking = Packing::kBytes;
    static constexpr int kMiddle = 128;
    static constexpr Scaling kScaling = Scaling::kOne;
    using Scale = bf16;
    const uint8_t* packed(const Place& at) const { return codes(at); }
    const uint8_t* scale(const Place& at) const { return scales_ + at.scale; }
    void scale_to(const Place& at, float* scale, float* least) const {
        *scale = widened(load_at<bf16>(this->scale(at))), *least = 0.0f;
    }

private:
    const uint8_t *codes_, *scales_;
};

// Weight 2i is in the low half of byte i, eight less than the number there.
template <class X>
class Int4 {
public:
    using Place = GroupPlace;

    explicit Int4(const StoredRow& row) : codes_(row.data), scales_(row.scales) {}

    const uint8_t* codes(const Place& at) const { return codes_ + at.k / 2; }

    static constexpr const float (&kCodes)[16] = kMinus8To7;

    auto value(const Place& at) const {
        const Vec scale = splat(load_at<bf16>(scales_ + at.scale));
        return [=](Vec q) { return mul(q, scale); };
    }

    template <class P>
    void look_up(const Place& at, const P& palette, X* out) const {
        palette.template look_up<Nibbles::kAdjacent>(codes(at), out);
    }

    void decode(const Place& at, X* out) {
        if (at.enters) palette_ = Palette<X>(Levels(kCodes, value(at)).of);
        look_up(at, palette_, out);
    }

    static constexpr Packing kPacking = Packing::kAdjacent;
    static constexpr int kMiddle = 8;
    static constexpr Scaling kScaling = Scaling::kOne;
    using Scale = bf16;
    const uint8_t* packed(const Place& at) const { return codes(at); }
    const uint8_t* scale(const Place& at) const { return scales_ + at.scale; }
    void scale_to(const Place& at, float* scale, float* least) const {
        *scale = widened(load_at<bf16>(this->scale(at))), *least = 0.0f;
    }

private:
    const uint8_t *codes_, *scales_;
    Palette<X> palette_;
};

}  // namespace moesd::MOESD_ISA
