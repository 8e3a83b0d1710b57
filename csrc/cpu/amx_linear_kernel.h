// y = x w^T + bias in bf16 on AMX tiles: items are blocks of weight rows, all panels of tokens pass over each.
#pragma once

#include "amx_tiles.h"
#include "dot_pairs.h"
#include "work.h"

namespace moesd::MOESD_ISA {

class AmxLinearKernel {
public:
    explicit AmxLinearKernel(const LinearArgs& a)
        : a_(a),
          panel_size_(steps_of(a.depth) * kStepSize),
          panels_((a.tokens + kTile - 1) / kTile),
          block_(a.features < 8 * kTile * a.threads ? 2 * kTile : 4 * kTile),
          pack_(panels_, a.threads),
          blocks_((a.features + block_ - 1) / block_) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<AmxLinearKernel*>(self)->work(); }, this);
    }

private:
    void work() {
        const Tiles tiles;
        pack_.share([this](int64_t p) { pack(p); });
        pack_.wait();
        int64_t i = blocks_.take();
        while (i < blocks_.total) {
            const int64_t following = blocks_.take();
            project(i * block_, following * block_);
            i = following;
        }
    }

    bf16* panel(int64_t p) const { return reinterpret_cast<bf16*>(a_.packed_x) + p * panel_size_; }
    const bf16* weights(int64_t row) const { return static_cast<const bf16*>(a_.w) + row * a_.depth; }

    // A panel that is not full repeats its last token, whose copies are never stored.
    void pack(int64_t p) const {
        const bf16* rows = static_cast<const bf16*>(a_.x) + p * kTile * a_.depth;
        transpose_pairs(rows, a_.depth, a_.tokens - p * kTile, a_.depth, nullptr, reinterpret_cast<__m512i*>(panel(p)));
    }

    void project(int64_t j, int64_t following) const {
        const int64_t rows = a_.features - j < block_ ? a_.features - j : block_;
        const bf16* next = following < a_.features ? weights(following) : nullptr;
        const int64_t half = block_ / 2 * a_.depth;  // the next block as two stretches
        Ahead ahead(next, next ? next + half : nullptr, half * sizeof(bf16), tile_loads(panels_, rows, a_.depth));
        const auto finish = [&](int64_t w, int64_t p, const float* sums) { store(j + w * kTile, p * kTile, sums); };
        panels_product(Block(weights(j), a_.depth, rows).tiles, panel(0), panel_size_, panels_, a_.depth, ahead, finish);
    }

    // Sixteen features from `feature` on of sixteen tokens from `token` on, as far as there are any.
    void store(int64_t feature, int64_t token, const float* sums) const {
        const int64_t width = a_.features - feature < kTile ? a_.features - feature : kTile;
        if (width <= 0) return;
        Vec by_token[kTile];
        sums_by_token(sums, by_token);
        alignas(64) float bias[kTile] = {};
        if (a_.bias) load_row(bias, static_cast<const bf16*>(a_.bias) + feature, width);
        bf16* out = static_cast<bf16*>(a_.out) + token * a_.features + feature;
        for (int64_t m = 0; m < kTile && token + m < a_.tokens; ++m, out += a_.features) {
            const Vec y = add(by_token[m], load(bias));
            if (width == kTile) {
                MOESD_ISA::store(out, y);
            } else {
                alignas(64) float row[kTile];
                MOESD_ISA::store(row, y);
                store_row(out, row, width);
            }
        }
    }

    const LinearArgs& a_;
    const int64_t panel_size_, panels_, block_;
    Rows pack_;
    Counter blocks_;
};

}  // namespace moesd::MOESD_ISA
