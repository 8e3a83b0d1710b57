// The sums of sixteen weight rows with the panels of some rows of activations, over all the depth.
#pragma once

#include "product.h"

namespace moesd::MOESD_ISA {

constexpr int64_t kTilePanels = 8;  // for which weights are read once
constexpr int64_t kBlockRuns = 8;   // of the longest blocks of a format
static_assert(kTileRuns % kBlockRuns == 0);
constexpr int kTileSize = kTileRows * kPanelRows;

// Rows of activations in panels that lie one after another.
struct Panels {
    uint8_t* memory;
    int64_t depth, rows;

    int64_t count() const { return (rows + kPanelRows - 1) / kPanelRows; }
    // Of those that are multiplied together with panel `first`.
    int64_t count_from(int64_t first) const {
        const int64_t left = count() - first;
        return left < kTilePanels ? left : kTilePanels;
    }
    Panel operator[](int64_t p) const { return {memory + p * Panel::bytes_of(depth), depth}; }
    int rows_of(int64_t p) const {
        const int64_t left = rows - p * kPanelRows;
        return static_cast<int>(left < kPanelRows ? left : kPanelRows);
    }
};

// Up to kTileRows rows of a matrix: first, first + step, ...
struct RowsOfTile {
    StoredRow rows[kTileRows];
    int64_t width;

    // Missing rows are copies of the last, whose sums nobody reads. `left`: how many there are.
    RowsOfTile(const Matrix<float>& matrix, int64_t first, int64_t step, int64_t left)
        : width(left < kTileRows ? left : kTileRows) {
        for (int64_t r = 0; r < kTileRows; ++r) {
            rows[r] = matrix.stored_row(first + (r < width ? r : width - 1) * step);
        }
    }
};

// sums[i]: of panel first + i, for `count` <= kTilePanels, [row of the panel][row of the tile].
template <class Product>
void tile_sums(const CodeReader& reader, const RowsOfTile& tile_rows, const Panels& panels,
               int64_t first, int64_t count, WeightsAhead& ahead, float (*sums)[kTileSize]) {
    std::memset(sums, 0, count * sizeof(sums[0]));
    const int64_t runs = panels.depth / kRun;
    // Codes that one panel takes need no memory; rows that are copies do not lie evenly apart.
    const bool is_whole = tile_rows.width == kTileRows;
    if (is_whole && count == 1 && panels.rows_of(first) <= Product::kFusedRows) {
        const int rows = panels.rows_of(first);
        return reader.read_and_add(tile_rows.rows, runs, panels[first], rows, sums[0], ahead);
    }
    CodeTile tile;
    // Parts end where blocks do, whose runs share bytes.
    const int64_t unit = runs % kBlockRuns == 0 ? kBlockRuns : 1;
    const int64_t parts = (runs + kTileRuns - 1) / kTileRuns;
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t run = runs / unit * part / parts * unit;
        tile.runs = runs / unit * (part + 1) / parts * unit - run;
        reader.read(tile_rows.rows, run * kRun, ahead, tile);
        for (int64_t i = 0; i < count; ++i) {
            const Panel x(panels[first + i], run);
            reader.add(tile, x, panels.rows_of(first + i), sums[i], ahead);
        }
    }
}

}  // namespace moesd::MOESD_ISA
