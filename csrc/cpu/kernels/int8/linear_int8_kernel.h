// y = x w^T + bias with activations rounded to eight bits and weights that are stored as integers.
// A work item is a block of weight rows, with all tokens.
#pragma once

#include "../work.h"
#include "product.h"

namespace moesd::MOESD_ISA {

// W: of x, bias and y. Product: how integers are multiplied.
template <class W, class Product>
class LinearInt8Kernel {
    static constexpr int64_t kPanels = 8;                // for which weights are read once
    static constexpr int64_t kMostRows = 4 * kTileRows;  // of a block
    static constexpr int64_t kFetches = 2;               // of Ahead, for each run of a tile

public:
    explicit LinearInt8Kernel(const LinearArgs& a)
        : a_(a),
          reader_(code_reader_of<Product>(a.w.format)),
          w_(a.w, a.depth),
          panels_((a.tokens + kPanelRows - 1) / kPanelRows),
          runs_(a.depth / kRun),
          pack_(panels_ * runs_, a.threads),
          block_(a.features < 8 * kMostRows * a.threads ? 2 * kTileRows : kMostRows),
          blocks_((a.features + block_ - 1) / block_) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<LinearInt8Kernel*>(self)->work(); }, this);
    }

private:
    void work() {
        const typename Product::Thread thread(a_.tokens);
        int64_t i = blocks_.take();
        // While activations are packed, the first weights come.
        ahead_of(i, 1).fetch();
        pack_.share([this](int64_t item) { pack(item); });
        pack_.wait();
        while (i < blocks_.total) {
            const int64_t next = blocks_.take();
            Ahead ahead = ahead_of(next, kFetches * block_ / kTileRows * runs_);
            for (int64_t j = i * block_; j < end_of(i); j += kTileRows) {
                for (int64_t p = 0; p < panels_; p += kPanels) project(j, p, ahead);
            }
            i = next;
        }
    }

    // The weights of a block, if there is one, to be fetched in so many times.
    Ahead ahead_of(int64_t block, int64_t times) const {
        if (block >= blocks_.total || runs_ == 0) return {nullptr, 0, 1};
        return {w_.row(block * block_), (end_of(block) - block * block_) * a_.w.row_bytes, times};
    }

    int64_t end_of(int64_t block) const {
        const int64_t end = (block + 1) * block_;
        return end < a_.features ? end : a_.features;
    }

    Panel panel(int64_t p) const {
        return {reinterpret_cast<uint8_t*>(a_.packed_x) + p * Panel::bytes_of(a_.depth), a_.depth};
    }
    int rows_of(int64_t p) const {
        const int64_t left = a_.tokens - p * kPanelRows;
        return static_cast<int>(left < kPanelRows ? left : kPanelRows);
    }

    // An item is a run of a panel, whose numbers share cache lines with those of no other.
    void pack(int64_t item) const {
        const int64_t p = item / runs_;
        const W* rows[kPanelRows];
        for (int m = 0; m < rows_of(p); ++m) {
            rows[m] = static_cast<const W*>(a_.x) + (p * kPanelRows + m) * a_.depth;
        }
        pack_run(rows, rows_of(p), item % runs_, reader_.order, panel(p));
    }

    // Weight rows j .. j + kTileRows with panels first .. first + kPanels.
    void project(int64_t j, int64_t first, Ahead& ahead) const {
        const int64_t count = panels_ - first < kPanels ? panels_ - first : kPanels;
        const int64_t width = a_.features - j < kTileRows ? a_.features - j : kTileRows;
        StoredRow rows[kTileRows];
        for (int64_t r = 0; r < kTileRows; ++r) {
            rows[r] = w_.stored_row(j + (r < width ? r : width - 1));
        }
        alignas(64) float sums[kPanels][kTileRows * kPanelRows];
        std::memset(sums, 0, count * sizeof(sums[0]));
        CodeTile tile;
        const int64_t parts = (runs_ + kTileRuns - 1) / kTileRuns;
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t run = runs_ * part / parts;
            tile.runs = runs_ * (part + 1) / parts - run;
            reader_.read(rows, run * kRun, ahead, tile);
            for (int64_t p = 0; p < count; ++p) {
                const Panel x(panel(first + p), run);
                if (reader_.has_least) {
                    Product::template add<true>(tile, x, rows_of(first + p), sums[p], ahead);
                } else {
                    Product::template add<false>(tile, x, rows_of(first + p), sums[p], ahead);
                }
            }
        }
        for (int64_t p = 0; p < count; ++p) store(j, width, first + p, sums[p]);
    }

    void store(int64_t j, int64_t width, int64_t p, float* sums) const {
        alignas(64) float bias[kTileRows] = {};
        if (a_.bias) load_row(bias, static_cast<const W*>(a_.bias) + j, width);
        for (int m = 0; m < rows_of(p); ++m) {
            float* row = sums + m * kTileRows;
            for (int r = 0; r < kTileRows; ++r) row[r] += bias[r];
            store_row(static_cast<W*>(a_.out) + (p * kPanelRows + m) * a_.features + j, row, width);
        }
    }

    const LinearArgs& a_;
    const CodeReader reader_;
    const Matrix<float> w_;
    const int64_t panels_, runs_, block_;
    Rows pack_;
    Counter blocks_;
};

}  // namespace moesd::MOESD_ISA
