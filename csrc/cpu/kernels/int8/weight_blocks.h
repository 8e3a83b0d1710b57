// How threads share a linear layer's weight rows where activations are packed first.
#pragma once

#include "../work.h"
#include "weights_ahead.h"

namespace moesd::MOESD_ISA {

// Blocks of weight rows, of which a thread fetches the next while it multiplies one.
class WeightBlocks {
public:
    static constexpr int64_t kMostRows = 64;  // of a block

    explicit WeightBlocks(const LinearArgs& a)
        : a_(a),
          rows_(a.features < 8 * kMostRows * a.threads ? kMostRows / 2 : kMostRows),
          blocks_((a.features + rows_ - 1) / rows_) {}

    // Of a block that is whole.
    int64_t rows() const { return rows_; }

    // Calls pack(), then multiply(first row, past the last, ahead) for each block that this thread
    // takes, which calls ahead.fetch() `fetches` times in a whole one.
    template <class P, class F>
    void share(int64_t fetches, const P& pack, const F& multiply) {
        int64_t i = blocks_.take();
        // While activations are packed, the first weights come.
        ahead_of(i, 1).fetch();
        pack();
        while (i < blocks_.total) {
            const int64_t next = blocks_.take();
            WeightsAhead ahead = ahead_of(next, fetches);
            multiply(i * rows_, end_of(i), ahead);
            i = next;
        }
    }

private:
    // The weights of a block, if there is one, to be fetched in so many times.
    WeightsAhead ahead_of(int64_t block, int64_t times) const {
        if (block >= blocks_.total) return {};
        const int64_t first = block * rows_;
        return {a_.w, first, end_of(block) - first, times};
    }

    int64_t end_of(int64_t block) const {
        const int64_t end = (block + 1) * rows_;
        return end < a_.features ? end : a_.features;
    }

    const LinearArgs& a_;
    const int64_t rows_;
    Counter blocks_;
};

}  // namespace moesd::MOESD_ISA
