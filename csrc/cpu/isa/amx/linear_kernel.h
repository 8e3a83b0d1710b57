// y = x w^T + bias in bf16 on AMX tiles. A work item is a block of weight rows with all panels of
// tokens; or with a part of the panels where there are too few blocks for the threads, as in a
// router.
#pragma once

#include "weights.h"
#include "../../kernels/work.h"

namespace moesd::MOESD_ISA {

class AmxLinearKernel {
public:
    explicit AmxLinearKernel(const LinearArgs& a)
        : a_(a),
          extra_(panel_extra(a.w, a.depth)),
          panel_size_(extra_ + steps_of(a.depth) * kStepSize),
          panels_((a.tokens + kTile - 1) / kTile),
          block_(a.features < 8 * kTile * a.threads ? 2 * kTile : 4 * kTile),
          blocks_((a.features + block_ - 1) / block_),
          part_(panels_of_part()),
          w_(a.w, a.depth),
          pack_(panels_, a.threads),
          threads_(a.threads),
          items_(blocks_ * ((panels_ + part_ - 1) / part_)) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<AmxLinearKernel*>(self)->work(); }, this);
    }

private:
    void work() {
        const Tiles tiles;
        pack_.share([this](int64_t p) { pack(p); });
        pack_.wait();
        bf16* decoded = a_.decoded + threads_.take() * decoded_size(a_.depth);
        int64_t i = items_.take();
        while (i < items_.total) {
            const int64_t next_item = items_.take();
            project(i, next_item, decoded);
            i = next_item;
        }
    }

    // An even number, since two panels share the tiles of weights.
    int64_t panels_of_part() const {
        const int64_t parts = blocks_ < 2 * a_.threads ? 2 * a_.threads / blocks_ : 1;
        return ((panels_ + parts - 1) / parts + 1) / 2 * 2;
    }

    bf16* panel(int64_t p) const { return reinterpret_cast<bf16*>(a_.packed_x) + p * panel_size_; }

    // A panel that is not full repeats its last token, whose copies are never stored.
    void pack(int64_t p) const {
        const bf16* rows = static_cast<const bf16*>(a_.x) + p * kTile * a_.depth;
        transpose_pairs(rows, a_.depth, a_.tokens - p * kTile, a_.depth, nullptr,
                        reinterpret_cast<__m512i*>(panel(p) + extra_));
        fill_extra(a_.w, panel(p), a_.depth, a_.tokens - p * kTile);
    }

    // One item: a block of features for a part of the panels. `next_item`: the thread's next item;
    // `decoded`: its buffer.
    void project(int64_t item, int64_t next_item, bf16* decoded) const {
        const int64_t j = item % blocks_ * block_, first_panel = item / blocks_ * part_;
        const int64_t rows = a_.features - j < block_ ? a_.features - j : block_;
        const int64_t count = panels_ - first_panel < part_ ? panels_ - first_panel : part_;
        const int64_t next = next_item % blocks_ * block_, half = block_ / 2;
        const int64_t loads = tile_loads(count, rows, a_.depth);
        PrefetchStreams prefetch = next_item < items_.total && next != j
                                       ? prefetch_rows(w_, next, next + half, half, loads)
                                       : PrefetchStreams();
        const auto finish = [&](int64_t w, int64_t p, const float* first, const float* second) {
            store(j + w * kTile, (first_panel + p) * kTile, first, second);
        };
        const int64_t left = a_.tokens - first_panel * kTile, most = count * kTile;
        panels_product(w_, j, rows, panel(first_panel), panel_size_, left < most ? left : most,
                       prefetch, decoded, finish);
    }

    // Stores two tiles of sums: features `feature` .. `feature` + 32 of tokens `token` .. `token` +
    // 16, or fewer at the ends.
    void store(int64_t feature, int64_t token, const float* first, const float* second) const {
        const int64_t width = a_.features - feature < 2 * kTile ? a_.features - feature : 2 * kTile;
        if (width <= 0) return;
        alignas(64) float bias[2 * kTile] = {};
        if (a_.bias) load_row(bias, static_cast<const bf16*>(a_.bias) + feature, width);
        // A token's sums as bf16 are half as much to transpose as in fp32.
        __m512i pairs[kTile], by_token[kTile];
#pragma GCC unroll 16
        for (int n = 0; n < kTile; ++n) {
            const float* sums =
                n < kTile / 2 ? first + 2 * n * kTile : second + (2 * n - kTile) * kTile;
            pairs[n] = rounded_pairs(add(load(sums), splat(bias[2 * n])),
                                     add(load(sums + kTile), splat(bias[2 * n + 1])));
        }
        transpose16(pairs, by_token);
        const __mmask32 valid = width < 2 * kTile ? (uint32_t{1} << width) - 1 : ~uint32_t{0};
        bf16* out = static_cast<bf16*>(a_.out) + token * a_.features + feature;
        for (int64_t m = 0; m < kTile && token + m < a_.tokens; ++m, out += a_.features) {
            _mm512_mask_storeu_epi16(out, valid, by_token[m]);
        }
    }

    const LinearArgs& a_;
    const int64_t extra_, panel_size_, panels_, block_, blocks_, part_;
    const Matrix<bf16> w_;
    Rows pack_;
    Counter threads_, items_;
};

}  // namespace moesd::MOESD_ISA
