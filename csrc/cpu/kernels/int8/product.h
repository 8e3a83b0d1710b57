// Products of sixteen weight rows and up to sixteen rows of activations, both integers, on any
// processor; vnni/product.h is the same in AVX-512.
//
// Invariance: an output is the sum over runs, in ascending order, of the run's products, an exact
// integer (two where its halves have scales of their own), times both scales, and of the weights'
// least times the activations' sum; nothing else that shares the call plays a part.
#pragma once

#include "panel.h"
#include "weights_ahead.h"

namespace moesd::MOESD_ISA {

constexpr int kTileRows = 16;      // weight rows that are multiplied together
constexpr int64_t kTileRuns = 24;  // of each row that are read at a time, at most
constexpr int64_t kFetches = 2;    // of Ahead, for each run of a tile

// Some runs of a tile of weight rows: a weight is scale * (code - middle), or see Scaling.
struct CodeTile {
    int64_t runs;
    // By run, then as the product has it.
    alignas(64) uint8_t codes[kTileRuns * kTileRows * kRun];
    // By run, and within it by row.
    alignas(64) float scales[kTileRuns * kTileRows];
    alignas(64) float others[kTileRuns * kTileRows];  // leasts, or scales of second halves
};

// Reads runs of a tile's rows from weight k on, where no run before shares bytes with what follows:
// `out.runs` of them.
using ReadCodes = void(const StoredRow (&rows)[kTileRows], int64_t k, WeightsAhead& ahead,
                       CodeTile& out);
// Reads all runs of a tile's rows and adds their products with `count` rows of a panel to `sums`.
using ReadAndAdd = void(const StoredRow (&rows)[kTileRows], int64_t runs, const Panel& x, int count,
                        float* sums, WeightsAhead& ahead);

// Adds the products of a tile's runs with rows of a panel to `sums`, [row of the panel][row of the
// tile].
using AddProducts = void(const CodeTile& tile, const Panel& x, int rows, float* sums,
                         WeightsAhead& ahead);

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
                weights.scale_to(at, out.scales + i, out.others + i);
                take_codes(weights, at, out.codes + i * kRun);
            }
        }
    }

    template <Scaling S>
    static void add(const CodeTile& tile, const Panel& x, int rows, float* sums, WeightsAhead&) {
        for (int64_t run = 0; run < tile.runs; ++run) {
            const float* scales = tile.scales + run * kTileRows;
            const float* others = tile.others + run * kTileRows;
            for (int m = 0; m < rows; ++m) {
                const int64_t at = run * kPanelRows + m;
                for (int r = 0; r < kTileRows; ++r) {
                    const uint8_t* w = tile.codes + (run * kTileRows + r) * kRun;
                    int dots[2] = {x.starts[0][at], x.starts[1][at]};
                    for (int i = 0; i < kRun; ++i) {
                        dots[i / (kRun / 2)] += int{w[i]} * int{x.codes[at * kRun + i]};
                    }
                    if (S != Scaling::kHalves) dots[0] += dots[1];
                    float product = static_cast<float>(dots[0]) * scales[r];
                    if (S == Scaling::kHalves) product += static_cast<float>(dots[1]) * others[r];
                    float& sum = sums[m * kTileRows + r];
                    sum += product * x.scales[at];
                    if (S == Scaling::kAndLeast) sum += others[r] * x.sums[at];
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
            } else if constexpr (kPacking == Packing::kFiveBits) {
                const int lower = packed[i % (kRun / 2)] >> i / (kRun / 2) * 4 & 15;
                codes[i] = lower | (weights.upper(at)[i / 8] >> i % 8 & 1) << 4;
            } else if constexpr (kPacking == Packing::kFiveBitsOfBlock) {
                const int lower = packed[i] >> at.run % 2 * 4 & 15;
                codes[i] = lower | (weights.upper(at)[i] >> at.run & 1) << 4;
            } else if constexpr (kPacking == Packing::kSixBits) {
                const int lower = packed[at.run % 2 * kRun + i] >> at.run / 2 % 2 * 4 & 15;
                codes[i] = lower | (weights.upper(at)[i] >> at.run % 4 * 2 & 3) << 4;
            } else codes[i] = packed[i % (kRun / 2)] >> i / (kRun / 2) * 4 & 15;
            if constexpr (requires { Format::kIntegers; }) codes[i] = Format::kIntegers[codes[i]];
        }
    }
};

// How a format's weights are read for a product; `read` is null where they are no integers.
struct CodeReader {
    ReadCodes* read;
    ReadAndAdd* read_and_add;  // of products with kFusedRows
    AddProducts* add;
    PanelOrder order;
};

template <class Product>
constexpr CodeReader code_reader_of(WeightFormat format) {
    constexpr CodeReader kNone{nullptr, nullptr, nullptr, {false, false, 0}};
    return of_format(format, kNone, []<template <class> class Format>() -> CodeReader {
        using F = Format<float>;
        if constexpr (requires { F::kPacking; }) {
            ReadAndAdd* read_and_add = nullptr;
            if constexpr (Product::kFusedRows > 0) {
                read_and_add = Product::template read_and_add<F>;
            }
            constexpr PanelOrder kOrder{kEvenFirst<F>, F::kScaling == Scaling::kHalves, F::kMiddle};
            return {Product::template read<F>, read_and_add, Product::template add<F::kScaling>,
                    kOrder};
        } else {
            return kNone;
        }
    });
}

}  // namespace moesd::MOESD_ISA
