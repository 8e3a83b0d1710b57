// The place of each row's largest value, the lowest one among equals; NaN counts as the largest, as
// torch.argmax has it.
#pragma once

#include <cmath>

#include "row_kernels.h"

namespace moesd::MOESD_ISA {

template <class W>
class ArgmaxKernel {
    // Columns whose maximum is found before any place is looked for.
    static constexpr int64_t kSpan = 32 * kLanes;

public:
    explicit ArgmaxKernel(const ArgmaxArgs& a) : a_(a), rows_(a.rows, a.threads) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<ArgmaxKernel*>(self)->work(); }, this);
    }

private:
    void work() {
        rows_.share([this](int64_t r) {
            const W* x = static_cast<const W*>(a_.x) + r * a_.width;
            int64_t place = 0;
            const float top = by_spans(x, place);
            a_.ids[r] = place;
            a_.undefined[r] = !(top > -INFINITY);
        });
    }

    // The largest value and its place. Rows with a NaN or an infinity are left to `one_by_one`.
    float by_spans(const W* x, int64_t& place) const {
        float top = -INFINITY;
        Vec poison = splat(0.0f);
        for (int64_t from = 0; from < a_.width; from += kSpan) {
            const int64_t end = from + kSpan < a_.width ? from + kSpan : a_.width;
            Vec tops = splat(-INFINITY);
            for (int64_t i = from; i < end; i += kLanes) {
                const Vec v = columns(x, i, end);
                tops = max(v, tops), poison = fma(v, splat(0.0f), poison);
            }
            const float best = max_lanes(tops);
            if (best > top) top = best, place = from;  // of the span
        }
        alignas(64) float lanes[kLanes];
        store(lanes, poison);
        for (int l = 0; l < kLanes; ++l) {
            if (std::isnan(lanes[l])) return one_by_one(x, place);
        }
        for (int64_t i = place;; i += kLanes) {
            const int lane = first_equal(columns(x, i, a_.width), splat(top));
            if (lane < kLanes) return place = i + lane, top;
        }
    }

    float one_by_one(const W* x, int64_t& place) const {
        float top = -INFINITY;
        place = 0;
        for (int64_t i = 0; i < a_.width; ++i) {
            float v;
            load_row(&v, x + i, 1);
            if (std::isnan(v)) return place = i, v;
            if (v > top) top = v, place = i;
        }
        return top;
    }

    // Columns i .. i + kLanes; those from `end` on repeat the first.
    static Vec columns(const W* x, int64_t i, int64_t end) {
        if (i + kLanes <= end) return load(x + i);
        alignas(64) float lanes[kLanes];
        load_row(lanes, x + i, end - i);
        for (int64_t l = end - i; l < kLanes; ++l) lanes[l] = lanes[0];
        return load(lanes);
    }

    const ArgmaxArgs& a_;
    Rows rows_;
};

}  // namespace moesd::MOESD_ISA
