// y = x w^T + bias with activations rounded to eight bits and weights that are stored as integers.
// A work item is a block of weight rows, with all tokens.
#pragma once

#include "tile_sums.h"
#include "weight_blocks.h"

namespace moesd::MOESD_ISA {

// W: of x, bias and y. Product: how integers are multiplied.
template <class W, class Product>
class LinearInt8Kernel {
public:
    explicit LinearInt8Kernel(const LinearArgs& a)
        : a_(a),
          reader_(code_reader_of<Product>(a.w.format)),
          w_(a.w, a.depth),
          panels_{reinterpret_cast<uint8_t*>(a.packed_x), a.depth, a.tokens},
          runs_(a.depth / kRun),
          pack_(panels_.count() * runs_, a.threads),
          blocks_(a) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<LinearInt8Kernel*>(self)->work(); }, this);
    }

private:
    void work() {
        const typename Product::Thread thread(a_.tokens);
        const int64_t fetches = kFetches * blocks_.rows() / kTileRows * runs_;
        const auto pack_all = [this] {
            pack_.share([this](int64_t item) { pack(item); });
            pack_.wait();
        };
        blocks_.share(fetches, pack_all, [this](int64_t first, int64_t end, WeightsAhead& ahead) {
            for (int64_t j = first; j < end; j += kTileRows) {
                for (int64_t p = 0; p < panels_.count(); p += kTilePanels) project(j, p, ahead);
            }
        });
    }

    // An item is a run of a panel, whose numbers share cache lines with those of no other.
    void pack(int64_t item) const {
        const int64_t p = item / runs_;
        const W* rows[kPanelRows];
        for (int m = 0; m < panels_.rows_of(p); ++m) {
            rows[m] = static_cast<const W*>(a_.x) + (p * kPanelRows + m) * a_.depth;
        }
        pack_run(rows, panels_.rows_of(p), item % runs_, reader_.order, panels_[p]);
    }

    // Weight rows j .. j + kTileRows with panels first .. first + kTilePanels.
    void project(int64_t j, int64_t first, WeightsAhead& ahead) const {
        const int64_t count = panels_.count_from(first);
        const RowsOfTile tile(w_, j, 1, a_.features - j);
        alignas(64) float sums[kTilePanels][kTileSize], bias[kTileRows] = {};
        tile_sums<Product>(reader_, tile, panels_, first, count, ahead, sums);
        if (a_.bias) load_row(bias, static_cast<const W*>(a_.bias) + j, tile.width);
        for (int64_t i = 0; i < count; ++i) {
            for (int m = 0; m < panels_.rows_of(first + i); ++m) {
                float* row = sums[i] + m * kTileRows;
                for (int r = 0; r < kTileRows; ++r) row[r] += bias[r];
                const int64_t t = (first + i) * kPanelRows + m;
                store_row(static_cast<W*>(a_.out) + t * a_.features + j, row, tile.width);
            }
        }
    }

    const LinearArgs& a_;
    const CodeReader reader_;
    const Matrix<float> w_;
    const Panels panels_;
    const int64_t runs_;
    Rows pack_;
    WeightBlocks blocks_;
};

}  // namespace moesd::MOESD_ISA
