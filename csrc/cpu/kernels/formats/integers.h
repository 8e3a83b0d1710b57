// int8 and int4: signed integers in groups that share a scale in bf16.
#pragma once

#include "stored_row.h"

namespace moesd::MOESD_ISA {

struct GroupPlace {
    int64_t k, scale;  // of the weights, and of their scale in bytes
    int64_t group, left;
    bool enters = true;  // another group than the place before

    GroupPlace(int64_t weight, const StoredRow& row)
        : k(weight),
          scale(weight / row.group * sizeof(bf16)),
          group(row.group),
          left(row.group - weight % row.group) {}

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

    void decode(const Place& at, X* out) {
        if (at.enters) {
            const Vec scale = splat(load_at<bf16>(scales_ + at.scale));
            palette_ = palette_of<X>(kMinus8To7, [=](Vec q) { return mul(q, scale); });
        }
        palette_.template look_up<Nibbles::kAdjacent>(codes_ + at.k / 2, out);
    }

private:
    const uint8_t *codes_, *scales_;
    Palette<X> palette_;
};

}  // namespace moesd::MOESD_ISA
