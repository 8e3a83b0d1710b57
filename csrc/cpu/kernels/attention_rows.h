// The (query, head) rows that share one pass over the keys of a sequence, and their online softmax.
// Each row has its own maximum, its own weights exp(score - maximum) and its own sums, so its
// result does not depend on which rows share the pass.
#pragma once

#include "add_values.h"
#include "ahead.h"
#include "dot_rows.h"
#include "row_kernels.h"

namespace moesd::MOESD_ISA {

constexpr int kBlockPositions = 128;  // positions whose scores are computed at a time

// Up to Max rows: all heads of the first query, then all heads of the second, and so on.
template <class W, int Max>
class AttentionRows {
public:
    static constexpr int kMax = Max;
    static constexpr bool kFetchesNext = false;  // see RaggedAttention::expect
    int heads = 0, queries = 0;

    explicit AttentionRows(const AttentionArgs& a)
        : a_(a), depth_(align_depth(a.head_dim)), width_(align_depth(a.value_dim)) {}

    int count() const { return heads * queries; }

    // How many positions of the block that begins at `start` each query sees.
    void count_visible(const int64_t* positions, int64_t start) {
        visible_to_all_ = kBlockPositions, visible_to_any_ = 0;
        for (int n = 0; n < queries; ++n) {
            const int64_t left = positions[n] + 1 - start;
            visible_[n] = left < 0 ? 0 : left < kBlockPositions ? left : kBlockPositions;
            visible_to_all_ = visible_[n] < visible_to_all_ ? visible_[n] : visible_to_all_;
            visible_to_any_ = visible_[n] > visible_to_any_ ? visible_[n] : visible_to_any_;
        }
    }

    // out = row m's sums of weighted values, divided by the sum of its weights.
    void finish(int m, W* out) {
        float* acc = acc_ + m * width_;
        const Vec inverse = splat(1.0f / sum_[m]);
        for (int64_t d = 0; d < a_.value_dim; d += Values<W>::kWide) {
            Vec a = mul(load(acc + d), inverse), b = mul(load(acc + d + kLanes), inverse);
            Values<W>::to_memory_order(a, b);
            store(acc + d, a), store(acc + d + kLanes, b);
        }
        store_row(out, acc, a_.value_dim);
    }

protected:
    using Weight = typename Values<W>::Weight;
    static constexpr int kWeightStride = kBlockPositions * sizeof(float) / sizeof(Weight);

    // Packs the rows, of which q is the first, and clears their sums. A sink is a score without a
    // value: it starts as the row's maximum, with a weight of exp(0). Without one, a row whose
    // scores are all -inf has no softmax: its weights exp(-inf - -inf) are NaN, as torch's are.
    void start_rows(const W* q, int64_t head) {
        for (int m = 0; m < count(); ++m) {
            pack_row(q + m / heads * a_.q_query + m % heads * a_.q_head, a_.head_dim,
                     query_ + m * depth_);
            top_[m] = a_.sinks ? a_.sinks[head + m % heads] : -INFINITY;
            sum_[m] = a_.sinks ? 1.0f : 0.0f;
        }
        std::memset(acc_, 0, count() * width_ * sizeof(float));
    }

    // Turns row m's scores of a block into weights exp(score - maximum), after scaling the sums of
    // earlier blocks to the maximum that includes this block.
    void weigh(int m, int64_t num_positions) {
        float* scores = scores_ + m * kBlockPositions;
        const int64_t padded = (num_positions + kLanes - 1) / kLanes * kLanes;
        // Padding that changes no maximum.
        for (int64_t i = num_positions; i < padded; ++i) scores[i] = scores[0];
        Vec tops = splat(top_[m]);
        for (int64_t i = 0; i < padded; i += kLanes) {
            const Vec scaled = mul(load(scores + i), splat(a_.scale));
            store(scores + i, scaled);
            tops = max(scaled, tops);
        }
        const float top = max_lanes(tops);  // at least top_[m], which is in every lane
        if (top_[m] != top) {
            alignas(64) float lanes[kLanes];
            store(lanes, exp(splat(top_[m] - top)));
            for (int64_t d = 0; d < width_; ++d) acc_[m * width_ + d] *= lanes[0];
            sum_[m] *= lanes[0];
            top_[m] = top;
        }
        Weight* weights = weights_of(m);
        for (int64_t i = 0; i < padded; i += kLanes) {
            Values<W>::store_weights(weights + i, exp(sub(load(scores + i), splat(top))));
        }
        for (int64_t i = num_positions; i < padded; ++i) weights[i] = Weight{};
        Vec sums = splat(0.0f);  // of the weights as they were rounded for storage
        for (int64_t i = 0; i < padded; i += kLanes) sums = add(sums, load(weights + i));
        sum_[m] += sum_lanes(sums);
    }

    // A row's weights overwrite its scores: a weight is no wider than a score.
    Weight* weights_of(int m) { return reinterpret_cast<Weight*>(scores_ + m * kBlockPositions); }

    const AttentionArgs& a_;
    const int64_t depth_, width_;
    // Positions of the current block: seen by every query, by at least one, and by each query.
    int64_t visible_to_all_ = 0, visible_to_any_ = 0;
    int64_t visible_[Max];
    float top_[Max], sum_[Max];
    alignas(64) typename Dot<W>::Act query_[Max * align_depth(kMaxHeadDim)];
    alignas(64) float acc_[Max * align_depth(kMaxHeadDim)];  // columns in the order of Values<W>
    alignas(64) float scores_[Max * kBlockPositions];
};

template <class W>
class VectorRows : public AttentionRows<W, 24> {
    using Base = AttentionRows<W, 24>;
    using Base::a_, Base::visible_to_all_, Base::visible_to_any_, Base::visible_, Base::scores_,
        Base::width_;

public:
    using Base::Base, Base::heads, Base::queries;
    static constexpr bool kFetchesNext = true;

    void start(const W* q, int64_t head) {
        Base::start_rows(q, head);
        for (int m = 0; m < Base::count(); ++m) xs_[m] = Base::query_ + m * Base::depth_;
    }

    // The scores that some query must not see are computed with the others, and that query never
    // reads them. Values that all queries see are added to all of them together, the others to each
    // query by itself, so that no hidden value, which may be NaN, reaches a sum.
    void add_block(const W* keys, const W* values, bool last_block) {
        const int rows = Base::count();
        for (int64_t i = 0; i < visible_to_any_; i += kScored) {
            const int64_t left = visible_to_any_ - i;
            const bool last = last_block && left <= kScored;
            ahead_.fetch();
            dot_rows<W>(xs_, rows, keys + i * a_.k_position, a_.k_position,
                        left < kScored ? left : kScored, a_.head_dim,
                        last ? nullptr : keys + (i + kScored) * a_.k_position, scores_ + i,
                        kBlockPositions);
        }
        for (int m = 0; m < rows; ++m) {
            ahead_.fetch();
            if (visible_[m / heads] > 0) Base::weigh(m, visible_[m / heads]);
        }
        const int64_t shared =
            visible_to_all_ / Values<W>::kStepPositions * Values<W>::kStepPositions;
        for (int64_t i = 0; i < shared; i += kScored) {
            ahead_.fetch();
            add_range(0, rows, values, i, i + kScored < shared ? i + kScored : shared);
        }
        for (int n = 0; n < queries; ++n) {
            if (visible_[n] > shared) add_range(n * heads, heads, values, shared, visible_[n]);
        }
    }

    // What add_block fetches beside its own work: as many numbers of keys and of values, in so many
    // parts.
    void expect(const W* keys, const W* values, int64_t count, int64_t parts) {
        const auto* first = reinterpret_cast<const uint8_t*>(keys);
        const int64_t distance = reinterpret_cast<const uint8_t*>(values) - first;
        ahead_ = {first, distance, count * static_cast<int64_t>(sizeof(W)), parts};
    }
    void expect_nothing() { ahead_ = {nullptr, 0, 0, 1}; }

    // The parts of a pass of `rows` rows over so many positions.
    static int64_t fetches(int64_t rows, int64_t positions) {
        return 2 * ((positions + kScored - 1) / kScored) +
               rows * ((positions + kBlockPositions - 1) / kBlockPositions);
    }

private:
    static constexpr int64_t kScored = 32;  // positions whose keys or values are read at a time

    // Adds the values of the block's positions [start, end) to rows m .. m + count.
    void add_range(int m, int count, const W* values, int64_t start, int64_t end) {
        add_values<W>(Base::acc_ + m * width_, width_, count, Base::weights_of(m) + start,
                      Base::kWeightStride, values + start * a_.v_position, a_.v_position,
                      end - start, a_.value_dim);
    }

    const typename Dot<W>::Act* xs_[Base::kMax];
    AheadOf<2> ahead_{nullptr, 0, 0, 1};
};

}  // namespace moesd::MOESD_ISA
