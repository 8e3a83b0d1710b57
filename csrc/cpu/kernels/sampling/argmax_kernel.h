// The index of each row's largest value, the lowest index among equals. As in torch.argmax, NaN is
// larger than any number.
#pragma once

#include <cmath>

#include "../row_kernels.h"

namespace moesd::MOESD_ISA {

template <class W>
class ArgmaxKernel {
    // Columns of a span: the span that holds the maximum is found first, then the index in it.
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
            int64_t index = 0;
            const float top = largest_by_spans(x, index);
            a_.ids[r] = index;
            a_.undefined[r] = !(top > -INFINITY);
        });
    }

    // The largest value and its index. Rows with NaN or infinity are left to largest_one_by_one:
    // they make `poison` NaN, since zero times either is NaN.
    float largest_by_spans(const W* x, int64_t& index) const {
        float top = -INFINITY;
        Vec poison = splat(0.0f);
        for (int64_t start = 0; start < a_.width; start += kSpan) {
            const int64_t end = start + kSpan < a_.width ? start + kSpan : a_.width;
            Vec tops = splat(-INFINITY);
            for (int64_t i = start; i < end; i += kLanes) {
                const Vec v = columns(x, i, end);
                tops = max(v, tops), poison = fma(v, splat(0.0f), poison);
            }
            const float best = max_lanes(tops);
            if (best > top) top = best, index = start;
        }
        alignas(64) float lanes[kLanes];
        store(lanes, poison);
        for (int l = 0; l < kLanes; ++l) {
            if (std::isnan(lanes[l])) return largest_one_by_one(x, index);
        }
        for (int64_t i = index;; i += kLanes) {
            const int lane = first_equal(columns(x, i, a_.width), splat(top));
            if (lane < kLanes) return index = i + lane, top;
        }
    }

    float largest_one_by_one(const W* x, int64_t& index) const {
        float top = -INFINITY;
        index = 0;
        for (int64_t i = 0; i < a_.width; ++i) {
            float v;
            load_row(&v, x + i, 1);
            if (std::isnan(v)) return index = i, v;
            if (v > top) top = v, index = i;
        }
        return top;
    }

    // Columns i .. i + kLanes; in index of columns from `end` on, column i.
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
