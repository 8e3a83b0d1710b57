// Vectorised exponential and the experts' activations, on fp32 lanes. Every element takes the same
// instructions wherever it lies in a row, so results do not depend on where it lies or on the
// batch.
#pragma once

#include <cmath>

#include "../types.h"

namespace moesd::MOESD_ISA {

// exp(x) to about one ulp: 2^n * p(r) with |r| <= ln(2)/2 (Cephes' expf coefficients). Saturates
// instead of overflowing, so that 1 / (1 + exp(-x)) stays finite; NaN stays NaN.
inline Vec exp(Vec x) {
    x = min(splat(88.3f), max(splat(-87.3f), x));
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Vec n = sub(fma(x, splat(1.44269504f), magic), magic);
    Vec r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    Vec p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = add(fma(p, mul(r, r), r), splat(1.0f));
    return mul(p, exp2_int(n));
}

inline Vec sigmoid(Vec x) { return div(splat(1.0f), add(splat(1.0f), exp(sub(splat(0.0f), x)))); }

inline Vec gelu(Vec x) {
    alignas(64) float lanes[kLanes];
    store(lanes, x);
    for (int i = 0; i < kLanes; ++i) {
        lanes[i] = 0.5f * lanes[i] * (1.0f + std::erf(lanes[i] * 0.70710678f));
    }
    return load(lanes);
}

inline Vec activate(Activation kind, Vec x) {
    switch (kind) {
        case Activation::kSilu: return div(x, add(splat(1.0f), exp(sub(splat(0.0f), x))));
        case Activation::kGelu: return gelu(x);
        case Activation::kGeluTanh: {
            // 0.5 * (1 + tanh(u)) == sigmoid(2u)
            Vec cubed = mul(mul(x, x), x);
            Vec u = mul(splat(1.5957691216f), fma(splat(0.044715f), cubed, x));
            return mul(x, sigmoid(u));
        }
        case Activation::kRelu: return max(splat(0.0f), x);
        case Activation::kRelu2: {
            Vec positive = max(splat(0.0f), x);
            return mul(positive, positive);
        }
    }
    return x;
}

}  // namespace moesd::MOESD_ISA
