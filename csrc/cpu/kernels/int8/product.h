// Products of sixteen weight rows and up to sixteen rows of activations, both integers, on any
// processor; vnni_product.h is the same in AVX-512.
//
// Invariance: an output is the sum over runs, in ascending order, of the run's products, an exact
// integer, times both scales, and of the weights' least times the activations' sum; nothing else
// that shares the call plays a part.
#pragma once

#include "panel.h"
#include "weights_ahead.h"

namespace moesd::MOESD_ISA {

constexpr int kTileRows = 16;      // weight rows that are multiplied together
constexpr int64_t kTileRuns = 24;  // of each row that are read at a time, at most
constexpr int64_t kFetches = 2;    // of Ahead, for each run of a tile

// Some runs of a tile of weight rows: a weight is scale * (code - middle) + least.
struct CodeTile {
    int64_t runs;
    // By run, then as the product has it; and room for a run that shares bytes with the last.
    alignas(64) uint8_t codes[(kTileRuns + 1) * kTileRows * kRun];
    // By run, and within it by row.
    alignas(64) float scales[kTileRuns * kTileRows];
    alignas(64) float leasts[kTileRuns * kTileRows];
};

// Reads runs of a tile's rows from weight k, a multiple of kRun, on: `out.runs` of them.
using ReadCodes = void(const StoredRow (&rows)[kTileRows], int64_t k, WeightsAhead& ahead,
                       CodeTile& out);
// Reads all runs of a tile's rows and adds their products with `count` rows of a panel to `sums`.
using ReadAndAdd = void(const StoredRow (&rows)[kTileRows], int64_t runs, const Panel& x, int count,
                        float* sums, WeightsAhead& ahead);

// The order of a run's codes: codes of two adjacent weights that share a byte come apart, the even
// ones first, and so do the activations.
template <class Format>
constexpr bool kEvenFirst = Format::kPacking == Packing::kAdjacent;

class PlainProduct {
public:
    // What a thread holds while it multiplies `rows` rows of activations.
    struct Thread {
        explicit Thread(int64_t rows) {}
    };
    static constexpr int kFusedRows = 0;  // of activations that read_and_add may take

    // Codes by run and row.
    template <class Format>
    static void read(const StoredRow (&rows)[kTileRows], int64_t k, WeightsAhead&, CodeTile& out) {
        for (int r = 0; r < kTileRows; ++r) {
            Format weights(rows[r]);
            typename Format::Place at(k, rows[r]);
            for (int64_t run = 0; run < out.runs; ++run, at.next()) {
                const int64_t i = run * kTileRows + r;
                weights.scale_to(at, out.scales + i, out.leasts + i);
                take_codes(weights, at, out.codes + i * kRun);
            }
        }
    }

    // Adds the products with the tile's runs to `sums`, [row of the panel][row of the tile].
    template <bool HasLeast>
    static void add(const CodeTile& tile, const Panel& x, int rows, float* sums, WeightsAhead&) {
        for (int64_t run = 0; run < tile.runs; ++run) {
            const float* scales = tile.scales + run * kTileRows;
            const float* leasts = tile.leasts + run * kTileRows;
            for (int m = 0; m < rows; ++m) {
                const int64_t at = run * kPanelRows + m;
                for (int r = 0; r < kTileRows; ++r) {
                    const uint8_t* w = tile.codes + (run * kTileRows + r) * kRun;
                    int dot = x.starts[at];
                    for (int i = 0; i < kRun; ++i) dot += int{w[i]} * int{x.codes[at * kRun + i]};
                    float& sum = sums[m * kTileRows + r];
                    sum += static_cast<float>(dot) * scales[r] * x.scales[at];
                    if (HasLeast) sum += leasts[r] * x.sums[at];
                }
            }
        }
    }

private:
    template <class Format, class Place>
    static void take_codes(const Format& weights, const Place& at, uint8_t* codes) {
        constexpr Packing kPacking = Format::kPacking;
        const uint8_t* packed = weights.packed(at);
        for (int i = 0; i < kRun; ++i) {
            if constexpr (kPacking == Packing::kBytes) codes[i] = packed[i] ^ 0x80;
            else if constexpr (kPacking == Packing::kAlternating) {
                codes[i] = packed[i] >> at.run % 2 * 4 & 15;
            } else codes[i] = packed[i % (kRun / 2)] >> i / (kRun / 2) * 4 & 15;
            if constexpr (requires { Format::kIntegers; }) codes[i] = Format::kIntegers[codes[i]];
        }
    }
};

// How a format's weights are read for a product; `read` is null where they are not integers with
// one scale for each run.
struct CodeReader {
    ReadCodes* read;
    ReadAndAdd* read_and_add;  // of products with kFusedRows
    bool has_least;            // whether any least is not zero
    PanelOrder order;
};

template <class Product>
constexpr CodeReader code_reader_of(WeightFormat format) {
    constexpr CodeReader kNone{nullptr, nullptr, false, {false, 0}};
    return of_format(format, kNone, []<template <class> class Format>() -> CodeReader {
        using F = Format<float>;
        if constexpr (requires { F::kPacking; }) {
            ReadAndAdd* read_and_add = nullptr;
            if constexpr (Product::kFusedRows > 0) {
                read_and_add = Product::template read_and_add<F>;
            }
            return {
                Product::template read<F>, read_and_add, F::kHasLeast, {kEvenFirst<F>, F::kMiddle}};
        } else {
            return kNone;
        }
    });
}

}  // namespace moesd::MOESD_ISA
