// From the joined projection of queries, keys and values to attention's inputs: heads are
// normalised and rotated by their position, keys and values are written to their positions in the
// cache. Rounds where transformers' separate operations round, so that the results have the same
// bits.
#pragma once

#include "row_kernels.h"

namespace moesd::MOESD_ISA {

template <class W>
class RopeKernel {
public:
    explicit RopeKernel(const RopeArgs& a) : a_(a), tokens_(a.tokens, a.threads) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<RopeKernel*>(self)->work(); }, this);
    }

private:
    static constexpr int64_t kRow = kMaxHeadDim + kLanes;

    void work() {
        tokens_.share([this](int64_t t) { write_token(t); });
    }

    void write_token(int64_t t) const {
        const int64_t D = a_.head_dim, kv = a_.kv_heads * D;
        const W* row = static_cast<const W*>(a_.qkv) + t * (a_.q_heads + 2 * a_.kv_heads) * D;
        alignas(64) float cos[kRow], sin[kRow];  // lanes beyond D are computed and not stored
        load_row(cos, static_cast<const W*>(a_.cos) + t * D, D);
        load_row(sin, static_cast<const W*>(a_.sin) + t * D, D);
        rotate(row, a_.q_heads, static_cast<const W*>(a_.q_norm), a_.q_eps, cos, sin,
               static_cast<W*>(a_.q) + t * a_.q_heads * D);
        row += a_.q_heads * D;
        rotate(row, a_.kv_heads, static_cast<const W*>(a_.k_norm), a_.k_eps, cos, sin,
               static_cast<W*>(a_.keys) + a_.index[t] * kv);
        std::memcpy(static_cast<W*>(a_.values) + a_.index[t] * kv, row + kv, kv * sizeof(W));
    }

    // For every head: out = n * cos + (-n's second half, n's first half) * sin, where n is the head
    // x, normalised if there is a norm.
    void rotate(const W* x, int64_t heads, const W* norm, float eps, const float* cos,
                const float* sin, W* out) const {
        const int64_t D = a_.head_dim;
        alignas(64) float scales[kLanes];  // of four heads
        for (int64_t h = 0; h < heads; ++h) {
            if (D / 2 % kLanes) {
                rotate_any(x + h * D, norm, eps, cos, sin, out + h * D);
                continue;
            }
            if (norm && h % 4 == 0) {
                inverse_rms4(x + h * D, heads - h < 4 ? heads - h : 4, D, eps, scales);
            }
            rotate_vectors(x + h * D, norm, splat(norm ? scales[h % 4] : 1.0f), cos, sin,
                           out + h * D);
        }
    }

    // One head whose halves do not fill vectors.
    void rotate_any(const W* x, const W* norm, float eps, const float* cos, const float* sin,
                    W* out) const {
        const int64_t D = a_.head_dim, half = D / 2;
        alignas(64) W normed[kRow];
        if (norm) normalise_row(x, norm, D, {eps}, normed), x = normed;
        alignas(64) float head[kRow], rotated[kRow];
        load_row(head, x, D);
        for (int64_t d = 0; d < half; ++d)
            rotated[d] = -head[half + d], rotated[half + d] = head[d];
        for (int64_t d = 0; d < D; d += kLanes) {
            const Vec a = rounded(mul(load(head + d), load(cos + d)), x),
                      b = rounded(mul(load(rotated + d), load(sin + d)), x);
            store(head + d, add(a, b));
        }
        store_row(out, head, D);
    }

    // One head whose halves fill vectors: all in registers. `scale`: 1 / rms of the head.
    void rotate_vectors(const W* x, const W* norm, Vec scale, const float* cos, const float* sin,
                        W* out) const {
        const int64_t half = a_.head_dim / 2;
        const auto head = [&](int64_t d) {
            return norm ? rounded(mul(load(norm + d), rounded(mul(load(x + d), scale), x)), x)
                        : load(x + d);
        };
        for (int64_t d = 0; d < half; d += kLanes) {
            const Vec a = head(d), b = head(half + d), minus_b = mul(splat(-1.0f), b);
            const auto rotated = [&](Vec v, Vec other, int64_t i) {
                store(out + i, add(rounded(mul(v, load(cos + i)), x),
                                   rounded(mul(other, load(sin + i)), x)));
            };
            rotated(a, minus_b, d), rotated(b, a, half + d);
        }
    }

    const RopeArgs& a_;
    Rows tokens_;
};

}  // namespace moesd::MOESD_ISA
