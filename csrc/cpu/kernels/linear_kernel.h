// y = x w^T + bias for few rows x. A work item is a block of weight rows, with all tokens.
#pragma once

#include "experts_kernel.h"

namespace moesd::MOESD_ISA {

template <class W>
class LinearKernel {
    using Act = typename Dot<W>::Act;

public:
    explicit LinearKernel(const LinearArgs& a)
        : a_(a),
          depth_(align_depth(a.depth)),
          w_(a.w, a.depth),
          block_(a.features < 2 * kBlock * a.threads ? 16 : kBlock),
          pack_(a.tokens, a.threads),
          rows_((a.features + block_ - 1) / block_) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<LinearKernel*>(self)->work(); }, this);
    }

private:
    void work() {
        pack_.share([this](int64_t t) {
            pack_row(static_cast<const W*>(a_.x) + t * a_.depth, a_.depth, packed(t));
        });
        pack_.wait();
        int64_t i = rows_.take();
        while (i < rows_.total) {
            int64_t next_item = rows_.take();
            project(i * block_, next_item);
            i = next_item;
        }
    }

    Act* packed(int64_t t) const { return reinterpret_cast<Act*>(a_.packed_x) + t * depth_; }

    void project(int64_t j, int64_t next_item) const {
        const uint8_t* next = next_item < rows_.total ? w_.row(next_item * block_) : nullptr;
        const int64_t rows = a_.features - j < block_ ? a_.features - j : block_;
        const int limit = chunk_tokens(depth_ * sizeof(Act), w_.decoder.runs);
        const Act* xs[kMaxChunk];
        alignas(64) float sums[kMaxChunk * kBlock];
        float bias[kBlock];
        if (a_.bias) load_row(bias, static_cast<const W*>(a_.bias) + j, rows);
        for (int64_t t = 0; t < a_.tokens; t += limit) {
            const int count = static_cast<int>(a_.tokens - t < limit ? a_.tokens - t : limit);
            for (int m = 0; m < count; ++m) xs[m] = packed(t + m);
            dot_stored<W>(xs, count, {w_, j, 1}, rows, next, sums, kBlock);
            for (int m = 0; m < count; ++m) {
                if (a_.bias) {
                    for (int64_t i = 0; i < rows; ++i) sums[m * kBlock + i] += bias[i];
                }
                store_row(static_cast<W*>(a_.out) + (t + m) * a_.features + j, sums + m * kBlock,
                          rows);
            }
        }
    }

    const LinearArgs& a_;
    const int64_t depth_;
    const Matrix<W> w_;
    const int64_t block_;
    Rows pack_;
    Counter rows_;
};

}  // namespace moesd::MOESD_ISA
