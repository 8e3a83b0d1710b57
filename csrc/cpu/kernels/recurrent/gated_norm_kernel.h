// RMS norms of groups of a row's numbers, times an activation of a gate: what recurrent layers put
// behind their recurrence. Rounds where transformers' classes round.
#pragma once

#include "../../recurrent.h"
#include "../row_kernels.h"

namespace moesd::MOESD_ISA {

template <class W>
class GatedNormKernel {
public:
    explicit GatedNormKernel(const GatedNormArgs& a)
        : a_(a), items_(a.rows * a.groups, a.threads) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<GatedNormKernel*>(self)->work(); }, this);
    }

private:
    // What a thread needs for its items; lanes beyond a group are computed and not stored.
    struct Block {
        alignas(64) float x[kMaxNormGroup + kLanes];
        alignas(64) float gate[kMaxNormGroup + kLanes];
        alignas(64) float w[kMaxNormGroup + kLanes];
    };

    void work() {
        Block block;
        items_.share([&](int64_t i) { norm(i / a_.groups, i % a_.groups * a_.width, block); });
    }

    // The group of a row that begins at `first`.
    void norm(int64_t row, int64_t first, Block& block) const {
        const int64_t n = a_.width;
        W* out = static_cast<W*>(a_.out) + row * a_.groups * n + first;
        load_row(block.x, static_cast<const W*>(a_.x) + row * a_.x_row + first, n);
        load_row(block.gate, static_cast<const W*>(a_.gate) + row * a_.gate_row + first, n);
        load_row(block.w, static_cast<const W*>(a_.w) + (a_.w_of_group ? 0 : first), n);
        for (int64_t i = 0; i < n; i += kLanes) {
            const Vec gate = load(block.gate + i);
            const Vec open = a_.sigmoid ? sigmoid(gate) : activate(Activation::kSilu, gate);
            store(block.gate + i, open);
            if (a_.gate_first) store(block.x + i, mul(load(block.x + i), open));
        }
        const Vec scale = inverse_rms(block.x, n, a_.eps);
        const auto kept = [&](Vec v) { return a_.cast_first ? rounded(v, out) : v; };
        for (int64_t i = 0; i < n; i += kLanes) {
            Vec v = mul(load(block.w + i), kept(mul(load(block.x + i), scale)));
            if (!a_.gate_first) v = mul(kept(v), load(block.gate + i));
            store(block.x + i, v);
        }
        store_row(out, block.x, n);
    }

    const GatedNormArgs& a_;
    Rows items_;
};

}  // namespace moesd::MOESD_ISA
