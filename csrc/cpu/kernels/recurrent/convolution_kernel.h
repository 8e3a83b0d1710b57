// Depthwise causal convolution of a few taps over windows of tokens. A work item is a block of
// channels, whose weights are read once for all rows.
#pragma once

#include "../../recurrent.h"
#include "../row_kernels.h"

namespace moesd::MOESD_ISA {

template <class W>
class ConvolutionKernel {
public:
    explicit ConvolutionKernel(const ConvolutionArgs& a)
        : a_(a), items_((a.channels + kChannels - 1) / kChannels, a.threads) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<ConvolutionKernel*>(self)->work(); }, this);
    }

private:
    // Enough to fetch a token's channels in runs, few enough to part between threads.
    static constexpr int64_t kChannels = 256;

    // What a thread needs for its items; lanes beyond the last channel are computed and not stored.
    struct Block {
        alignas(64) float taps[kMaxTaps][kChannels];
        alignas(64) float bias[kChannels] = {};
        alignas(64) float window[kMaxTaps][kChannels];  // of token s at s % taps
        alignas(64) float out[kChannels];
    };

    void work() {
        Block block;
        items_.share([&](int64_t i) {
            const int64_t channel = i * kChannels, left = a_.channels - channel;
            convolve(channel, left < kChannels ? left : kChannels, block);
        });
    }

    void convolve(int64_t channel, int64_t width, Block& block) const {
        read_taps(channel, width, block);
        if (a_.bias) load_row(block.bias, static_cast<const W*>(a_.bias) + channel, width);
        for (int64_t b = 0; b < a_.batch; ++b) {
            const W* window = static_cast<const W*>(a_.window.data) + b * a_.window.row + channel;
            W* out = static_cast<W*>(a_.out) + b * a_.tokens * a_.channels + channel;
            for (int64_t s = 0; s < a_.taps - 1; ++s) {
                load_row(block.window[s], window + s * a_.window.token, width);
            }
            for (int64_t t = 0; t < a_.tokens; ++t) {
                const int64_t newest = t + a_.taps - 1;
                load_row(block.window[newest % a_.taps], window + newest * a_.window.token, width);
                for (int64_t c = 0; c < width; c += kLanes) add_taps(t, c, out, block);
                store_row(out + t * a_.channels, block.out, width);
            }
        }
    }

    // out = the channels at c of token t, rounded before the activation as a convolution's result.
    void add_taps(int64_t t, int64_t c, const W* like, Block& block) const {
        Vec sum = load(block.bias + c);
        for (int64_t tap = 0, s = t % a_.taps; tap < a_.taps; ++tap) {
            sum = fma(load(block.taps[tap] + c), load(block.window[s] + c), sum);
            s = s + 1 == a_.taps ? 0 : s + 1;
        }
        if (a_.has_activation) sum = activate(a_.activation, rounded(sum, like));
        store(block.out + c, sum);
    }

    // Weights lie channel by channel, and are needed tap by tap.
    void read_taps(int64_t channel, int64_t width, Block& block) const {
        const W* weight = static_cast<const W*>(a_.weight) + channel * a_.taps;
        if (a_.taps == 4 && width == kChannels) {
            for (int64_t c = 0; c < width; c += kLanes, weight += 4 * kLanes) {
                Vec v[4] = {load(weight), load(weight + kLanes), load(weight + 2 * kLanes),
                            load(weight + 3 * kLanes)};
                deal_quads(v[0], v[1], v[2], v[3]);
                for (int tap = 0; tap < 4; ++tap) store(block.taps[tap] + c, v[tap]);
            }
            return;
        }
        for (int64_t c = 0; c < width; ++c) {
            for (int64_t tap = 0; tap < a_.taps; ++tap) {
                block.taps[tap][c] = widened(weight[c * a_.taps + tap]);
            }
        }
    }

    const ConvolutionArgs& a_;
    Rows items_;
};

}  // namespace moesd::MOESD_ISA
