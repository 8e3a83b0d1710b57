// Ops on single rows: RMS norm, gated activation and the softmax top-k router.
#pragma once

#include "activation.h"
#include "dot.h"
#include "work.h"

namespace moesd::MOESD_ISA {

// All lanes added up, in one fixed order.
inline float sum_lanes(Vec v) {
    float out[4];
    const Vec zero = splat(0.0f);
    store(out, sum4(v, zero, zero, zero));
    return out[0];
}

// Lane l: the sum of the squares of x[l], x[l + kLanes], ...
template <class W>
inline Vec squares_of(const W* x, int64_t width) {
    const int64_t whole = width / kLanes * kLanes;
    // Four chains hide the latency of fma.
    Vec squares = splat(0.0f), more[3] = {squares, squares, squares};
    int64_t i = 0;
    for (; i + 4 * kLanes <= whole; i += 4 * kLanes) {
        const Vec a = load(x + i);
        squares = fma(a, a, squares);
#pragma GCC unroll 3
        for (int c = 0; c < 3; ++c) {
            const Vec b = load(x + i + (c + 1) * kLanes);
            more[c] = fma(b, b, more[c]);
        }
    }
    squares = add(add(squares, more[0]), add(more[1], more[2]));
    for (; i < whole; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
    if (whole < width) {
        alignas(64) W tail[kLanes] = {};
        std::memcpy(tail, x + whole, (width - whole) * sizeof(W));
        squares = fma(load(tail), load(tail), squares);
    }
    return squares;
}

// 1 / rms(x) in every lane.
template <class W>
Vec inverse_rms(const W* x, int64_t width, float eps) {
    return splat(1.0f /
                 std::sqrt(sum_lanes(squares_of(x, width)) / static_cast<float>(width) + eps));
}

// out[r] = 1 / rms(row r) for `count` <= 4 rows, one after another in memory. The sums of squares
// of four rows are lanes of one vector, so that the division and the square root, which are slow,
// are computed once for all of them.
template <class W>
void inverse_rms4(const W* x, int64_t count, int64_t width, float eps, float (&out)[kLanes]) {
    const auto squares = [&](int64_t row) {
        return row < count ? squares_of(x + row * width, width) : splat(0.0f);
    };
    alignas(64) float sums[kLanes] = {};
    store(sums, sum4(squares(0), squares(1), squares(2), squares(3)));
    store(out, div(splat(1.0f),
                   sqrt(add(div(load(sums), splat(static_cast<float>(width))), splat(eps)))));
}

// out = the norm of the row x, weighted by w, as `rule` says.
template <class W>
void normalise_row(const W* x, const W* w, int64_t width, const NormRule& rule, W* out) {
    const int64_t whole = width / kLanes * kLanes;
    const Vec scale = inverse_rms(x, width, rule.eps), offset = splat(rule.offset);
    const auto step = [&](const W* from, const W* weight, W* to) {
        const Vec normed = mul(load(from), scale);
        store(to, mul(add(load(weight), offset), rule.cast_first ? rounded(normed, to) : normed));
    };
    for (int64_t i = 0; i < whole; i += kLanes) step(x + i, w + i, out + i);
    if (whole < width) {
        alignas(64) W tail[3][kLanes] = {};
        std::memcpy(tail[0], x + whole, (width - whole) * sizeof(W));
        std::memcpy(tail[1], w + whole, (width - whole) * sizeof(W));
        step(tail[0], tail[1], tail[2]);
        std::memcpy(out + whole, tail[2], (width - whole) * sizeof(W));
    }
}

// RMS norm of rows; or of the sums of rows and `delta`, which are stored in `sum`, too, and rounded
// to the input's dtype before the norm, as torch's addition does.
template <class W>
class NormKernel {
public:
    explicit NormKernel(const NormArgs& a) : a_(a), rows_(a.rows, a.threads) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<NormKernel*>(self)->work(); }, this);
    }

private:
    void work() {
        rows_.share([this](int64_t r) {
            const int64_t offset = r * a_.width;
            const W* x = static_cast<const W*>(a_.x) + offset;
            if (a_.delta) {
                x = add_row(x, static_cast<const W*>(a_.delta) + offset,
                            static_cast<W*>(a_.sum) + offset);
            }
            normalise_row(x, static_cast<const W*>(a_.w), a_.width, a_.rule,
                          static_cast<W*>(a_.out) + offset);
        });
    }

    // sum = x + delta, which it returns.
    const W* add_row(const W* x, const W* delta, W* sum) const {
        const int64_t whole = a_.width / kLanes * kLanes, rest = a_.width - whole;
        for (int64_t i = 0; i < whole; i += kLanes) {
            store(sum + i, add(load(x + i), load(delta + i)));
        }
        if (rest > 0) {
            alignas(64) W tail[3][kLanes] = {};
            std::memcpy(tail[0], x + whole, rest * sizeof(W));
            std::memcpy(tail[1], delta + whole, rest * sizeof(W));
            store(tail[2], add(load(tail[0]), load(tail[1])));
            std::memcpy(sum + whole, tail[2], rest * sizeof(W));
        }
        return sum;
    }

    const NormArgs& a_;
    Rows rows_;
};

// act(gate) * up. As in transformers' dense MLPs, the activation is rounded to the input's dtype
// before the product. Elements are independent, so a work item is a run of them across rows.
template <class W>
class ActKernel {
public:
    explicit ActKernel(const ActArgs& a)
        : a_(a), blocks_((a.elements + kElements - 1) / kElements) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<ActKernel*>(self)->work(); }, this);
    }

private:
    static constexpr int64_t kElements = 4096;

    void work() {
        for (int64_t b; (b = blocks_.take()) < blocks_.total;) {
            const int64_t end =
                (b + 1) * kElements < a_.elements ? (b + 1) * kElements : a_.elements;
            multiply(b * kElements, end);
        }
    }

    void multiply(int64_t i, int64_t end) const {
        const W *gate = static_cast<const W*>(a_.gate), *up = static_cast<const W*>(a_.up);
        W* out = static_cast<W*>(a_.out);
        for (; i + kLanes <= end; i += kLanes) step(gate + i, up + i, out + i);
        if (i == end) return;
        alignas(64) W tail[3][kLanes] = {};
        std::memcpy(tail[0], gate + i, (end - i) * sizeof(W));
        std::memcpy(tail[1], up + i, (end - i) * sizeof(W));
        step(tail[0], tail[1], tail[2]);
        std::memcpy(out + i, tail[2], (end - i) * sizeof(W));
    }

    void step(const W* gate, const W* up, W* out) const {
        store(out, mul(rounded(activate(a_.activation, load(gate)), out), load(up)));
    }

    const ActArgs& a_;
    Counter blocks_;
};

// The K largest of a token's softmax, which is computed in fp32, in descending order; among equals
// the lower id comes first. Of a token without a softmax (a logit is NaN or infinite, or all are
// -inf) the weights are NaN.
template <class W>
class RouterKernel {
public:
    explicit RouterKernel(const RouterArgs& a) : a_(a), tokens_(a.tokens, a.threads) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<RouterKernel*>(self)->work(); }, this);
    }

private:
    void work() {
        tokens_.share([this](int64_t t) { route(t); });
    }

    void route(int64_t t) const {
        alignas(64) float probs[kMaxExperts + kLanes] = {};
        const int64_t n = a_.experts;
        load_row(probs, static_cast<const W*>(a_.logits) + t * n, n);
        for (int64_t e = n; e < n + kLanes; ++e) probs[e] = -INFINITY;
        const float top = max_lanes(largest(probs, n));
        Vec sums = splat(0.0f);
        for (int64_t e = 0; e < n; e += kLanes) {
            store(probs + e, exp(sub(load(probs + e), splat(top))));
            // Lanes past the last expert add exp(-87.3), which is below half an ulp of the sum (at
            // least 1).
            sums = add(sums, load(probs + e));
        }
        const float total = sum_lanes(sums);
        float* weights = a_.weights + t * a_.top_k;
        int64_t* ids = a_.ids + t * a_.top_k;
        if (std::isnan(total)) {  // then every probability is NaN
            for (int64_t k = 0; k < a_.top_k; ++k) weights[k] = total, ids[k] = k;
            return;
        }
        for (int64_t e = 0; e < n; e += kLanes) {
            store(probs + e, div(load(probs + e), splat(total)));
        }
        for (int64_t e = n; e < n + kLanes; ++e) probs[e] = -1.0f;
        float kept = 0.0f;
        for (int64_t k = 0; k < a_.top_k; ++k) {
            const int64_t best = index_of(splat(max_lanes(largest(probs, n))), probs);
            weights[k] = probs[best], ids[k] = best, kept += probs[best];
            probs[best] = -1.0f;
        }
        for (int64_t k = 0; a_.renormalize && k < a_.top_k; ++k) weights[k] /= kept;
    }

    // Each lane's largest of probs[lane], probs[lane + kLanes], ...
    static Vec largest(const float* probs, int64_t n) {
        Vec tops = load(probs);
        for (int64_t e = kLanes; e < n; e += kLanes) tops = max(load(probs + e), tops);
        return tops;
    }

    // The lowest index of `value`, which is among the first n of probs.
    static int64_t index_of(Vec value, const float* probs) {
        for (int64_t e = 0;; e += kLanes) {
            const int lane = first_equal(load(probs + e), value);
            if (lane < kLanes) return e + lane;
        }
    }

    const RouterArgs& a_;
    Rows tokens_;
};

}  // namespace moesd::MOESD_ISA
