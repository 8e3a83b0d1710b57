// y = x w^T + bias with rows of x rounded to eight bits, a scale for each, and weights of eight
// bits that have one scale for a row. A work item is a block of weight rows, with all tokens.
//
// Invariance: an output is an exact integer, times both scales.
#pragma once

#include "../for_size.h"
#include "panel.h"
#include "row_product.h"
#include "weight_blocks.h"

namespace moesd::MOESD_ISA {

// W: of x, bias and y. Product: how integers are multiplied.
template <class W, class Product>
class LinearRowsKernel {
    static constexpr int kTokens = Product::kTokens;
    static constexpr int kChunk = 2 * kTokens;  // stay in the first-level cache with four rows
    static constexpr int64_t kMostRows = WeightBlocks::kMostRows;
    static constexpr int64_t kVector = 64;  // bytes

public:
    explicit LinearRowsKernel(const LinearArgs& a)
        : a_(a),
          // Rows a power of two apart would compete for the same lines of the first-level cache.
          stride_(((a.depth + kVector - 1) / kVector | 1) * kVector),
          codes_(reinterpret_cast<int8_t*>(a.packed_x)),
          scales_(reinterpret_cast<float*>(codes_ + a.tokens * stride_)),
          starts_(reinterpret_cast<int32_t*>(scales_ + a.tokens)),
          pack_(a.tokens, a.threads),
          blocks_(a) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<LinearRowsKernel*>(self)->work(); }, this);
    }

private:
    void work() {
        const int64_t steps = a_.depth / kVector > 0 ? a_.depth / kVector : 1;
        const int64_t tiles = (a_.tokens + kTokens - 1) / kTokens;
        const auto pack_all = [this] {
            pack_.share([this](int64_t t) { pack(t); });
            pack_.wait();
        };
        blocks_.share(blocks_.rows() / kRowsTogether * tiles * steps, pack_all,
                      [this](int64_t first, int64_t end, WeightsAhead& ahead) {
                          for (int64_t t = 0; t < a_.tokens; t += kChunk) {
                              project(first, end - first, t, ahead.codes);
                          }
                      });
    }

    const uint8_t* row(int64_t j) const {
        return static_cast<const uint8_t*>(a_.w.data) + j * a_.w.row_bytes;
    }

    void pack(int64_t t) {
        const W* x = static_cast<const W*>(a_.x) + t * a_.depth;
        alignas(64) float numbers[kRun];
        uint32_t largest = 0;
        for (int64_t k = 0; k < a_.depth; k += kRun) {
            load_row(numbers, x + k, kRun);
            const uint32_t of_run = largest_magnitude(numbers);
            largest = of_run > largest ? of_run : largest;
        }
        const CodeScale scale(largest);
        int8_t* codes = codes_ + t * stride_;
        int32_t sum = 0;
        for (int64_t k = 0; k < a_.depth; k += kRun) {
            load_row(numbers, x + k, kRun);
            round_run(numbers, scale.inverse, codes + k);
            for (int i = 0; i < kRun; ++i) sum += codes[k + i];
        }
        std::memset(codes + a_.depth, 0, stride_ - a_.depth);
        scales_[t] = scale.scale, starts_[t] = -128 * sum;
    }

    // Weight rows j .. j + rows with tokens first .. first + kChunk.
    void project(int64_t j, int64_t rows, int64_t first, Ahead& ahead) const {
        const int count = static_cast<int>(a_.tokens - first < kChunk ? a_.tokens - first : kChunk);
        const int8_t* xs[kChunk];
        for (int m = 0; m < count; ++m) xs[m] = codes_ + (first + m) * stride_;
        alignas(64) int32_t sums[kChunk * kMostRows];
        for (int64_t r = 0; r < rows; r += kRowsTogether) {
            const int64_t left = rows - r;
            FourRows w(row(j + r), a_.w.row_bytes, left, a_.depth,
                       left > kRowsTogether ? kRowsTogether * a_.w.row_bytes : 0);
            for (int m = 0; m < count; m += kTokens, w.next = 0) {
                for_size<kTokens>(count - m < kTokens ? count - m : kTokens, [&]<int M>() {
                    Product::template multiply<M>(xs + m, starts_ + first + m, w, ahead,
                                                  sums + m * kMostRows + r, kMostRows);
                });
            }
        }
        finish(j, rows, first, count, sums);
    }

    void finish(int64_t j, int64_t rows, int64_t first, int count, const int32_t* sums) const {
        alignas(64) float scales[kMostRows], bias[kMostRows] = {}, out[kMostRows];
        load_row(scales, static_cast<const bf16*>(a_.w.scales) + j, rows);
        if (a_.bias) load_row(bias, static_cast<const W*>(a_.bias) + j, rows);
        for (int m = 0; m < count; ++m) {
            const int32_t* dots = sums + m * kMostRows;
            for (int64_t r = 0; r < rows; ++r) {
                out[r] = static_cast<float>(dots[r]) * scales[r] * scales_[first + m] + bias[r];
            }
            store_row(static_cast<W*>(a_.out) + (first + m) * a_.features + j, out, rows);
        }
    }

    const LinearArgs& a_;
    const int64_t stride_;
    int8_t* const codes_;
    float* const scales_;
    int32_t* const starts_;
    Rows pack_;
    WeightBlocks blocks_;
};

}  // namespace moesd::MOESD_ISA
