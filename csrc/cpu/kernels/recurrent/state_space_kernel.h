// The steps of Mamba's and Mamba-2's state spaces over ragged rows: S = exp(dt A) S + (dt x) B and
// the output S C + D x. Channels are independent of each other, so a work item is a block of them,
// whose state is read once, taken through all tokens of its row in the caches, and written once,
// behind the last accepted token.
#pragma once

#include "../../recurrent.h"
#include "../row_kernels.h"

namespace moesd::MOESD_ISA {

// kPerChannel: each channel has a dt, a row of A and a D of its own (Mamba-1), not each head.
template <class W, bool kPerChannel>
class StateSpaceKernel {
public:
    explicit StateSpaceKernel(const StateSpaceArgs& a)
        : a_(a),
          blocks_((a.head_dim + kChannels - 1) / kChannels),
          items_(a.ragged.batch * a.heads * blocks_, a.threads) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<StateSpaceKernel*>(self)->work(); }, this);
    }

private:
    static constexpr int64_t kChannels = 32, kTogether = 4;

    // What a thread needs for its items.
    struct Block {
        alignas(64) float state[kChannels * kMaxStateSize];  // [channels, N]
        alignas(64) float padded[kChannels * kMaxStateSize];
        alignas(64) float b[kMaxStateSize];
        alignas(64) float c[kMaxStateSize];
        alignas(64) float x[kChannels] = {};
        alignas(64) float dt[kChannels] = {};
        alignas(64) float skip[kChannels] = {};  // D x
        alignas(64) float out[kChannels];
        const float* a[kChannels];  // Mamba-1's rows of A
        Vec decay{};                // Mamba-2's, of all channels
    };

    void work() {
        Block block;
        items_.share([&](int64_t i) {
            const int64_t channel = i % blocks_ * kChannels, h = i / blocks_ % a_.heads;
            advance(i / blocks_ / a_.heads, h, channel, block);
        });
    }

    // Takes up to kChannels channels of head h of sequence b through its tokens.
    void advance(int64_t b, int64_t h, int64_t channel, Block& block) const {
        const Ragged& r = a_.ragged;
        const int64_t left = a_.head_dim - channel, width = left < kChannels ? left : kChannels;
        const int64_t N = a_.state_size, inner = a_.heads * a_.head_dim;
        const int64_t first = h * a_.head_dim + channel;
        W* out = static_cast<W*>(a_.out) + b * r.tokens * inner + first;
        for (int64_t t = r.counts[b]; t < r.tokens; ++t) {
            std::memset(static_cast<void*>(out + t * inner), 0, width * sizeof(W));
        }
        if (r.counts[b] == 0) return;
        for (int64_t p = 0; kPerChannel && p < kChannels; ++p) {
            block.a[p] = a_.a + (p < width ? channel + p : channel) * N;
        }
        float* memory = a_.states + (r.rows[b] * inner + first) * N;
        // Channels are computed four at a time: what does not fill those is computed in a copy.
        const bool whole = width % kTogether == 0;
        float* home = whole ? memory : block.padded;
        if (!whole) {
            std::memset(home, 0, kChannels * N * sizeof(float));
            std::memcpy(home, memory, width * N * sizeof(float));
        }
        const float* state = home;
        for (int64_t t = 0; t < r.counts[b]; ++t) {
            const bool kept = t + 1 == r.keep[b];
            float* next = kept ? home : block.state;
            read_token(b, t, h, channel, width, block);
            for (int64_t p = 0; p < width; p += kTogether) {
                step(block, p, state + p * N, next + p * N);
            }
            store_row(out + t * inner, block.out, width);
            if (kept && !whole) std::memcpy(memory, home, width * N * sizeof(float));
            state = next;
        }
    }

    void read_token(int64_t b, int64_t t, int64_t h, int64_t channel, int64_t width,
                    Block& block) const {
        const int64_t N = a_.state_size, group = h / (a_.heads / a_.groups) * N;
        const int64_t token = b * a_.ragged.tokens + t;
        load_row(block.b, values_of(a_.b, b, t) + group, N);
        load_row(block.c, values_of(a_.c, b, t) + group, N);
        load_row(block.x, values_of(a_.x, b, t) + h * a_.head_dim + channel, width);
        for (int64_t p = 0; p < width; ++p) {
            const int64_t own = kPerChannel ? channel + p : h;
            block.dt[p] = a_.dt[token * (kPerChannel ? a_.head_dim : a_.heads) + own];
            block.skip[p] = a_.d[own] * block.x[p];
        }
        if (!kPerChannel) block.decay = exp(splat(block.dt[0] * a_.a[h]));
    }

    static const W* values_of(const TokenValues& v, int64_t b, int64_t t) {
        return static_cast<const W*>(v.data) + b * v.row + t * v.token;
    }

    // Four channels, of which p is the first, take in a token: out = S C + D x.
    void step(Block& block, int64_t p, const float* from, float* to) const {
        const int64_t N = a_.state_size, whole = N / kLanes * kLanes;
        float out[kTogether];
        Vec sums[kTogether], inputs[kTogether], dt[kTogether];
        for (int i = 0; i < kTogether; ++i) {
            inputs[i] = splat(block.dt[p + i] * block.x[p + i]);
            dt[i] = splat(block.dt[p + i]), sums[i] = splat(0.0f);
        }
        const Vec decay = block.decay;
        for (int64_t n = 0; n < whole; n += kLanes) {
            const Vec b = load(block.b + n), c = load(block.c + n);
            for (int i = 0; i < kTogether; ++i) {
                const Vec kept = kPerChannel ? exp(mul(dt[i], load(block.a[p + i] + n))) : decay;
                const Vec s = fma(inputs[i], b, mul(kept, load(from + i * N + n)));
                store(to + i * N + n, s);
                sums[i] = fma(s, c, sums[i]);
            }
        }
        store(out, sum4(sums[0], sums[1], sums[2], sums[3]));
        // One by one, so that nothing beyond the state takes part in a sum.
        for (int64_t n = whole; n < N; ++n) {
            for (int i = 0; i < kTogether; ++i) {
                const Vec kept = kPerChannel ? exp(mul(dt[i], splat(block.a[p + i][n]))) : decay;
                const float s =
                    first_lane(kept) * from[i * N + n] + first_lane(inputs[i]) * block.b[n];
                to[i * N + n] = s, out[i] += s * block.c[n];
            }
        }
        for (int i = 0; i < kTogether; ++i) block.out[p + i] = out[i] + block.skip[p + i];
    }

    static float first_lane(Vec v) {
        alignas(64) float lanes[kLanes];
        store(lanes, v);
        return lanes[0];
    }

    const StateSpaceArgs& a_;
    const int64_t blocks_;
    Rows items_;
};

template <class W>
using Mamba2Kernel = StateSpaceKernel<W, false>;
template <class W>
using MambaKernel = StateSpaceKernel<W, true>;

}  // namespace moesd::MOESD_ISA
