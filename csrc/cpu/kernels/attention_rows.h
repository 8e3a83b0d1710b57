// The (query, head) rows that pass over the keys of a sequence together, and their online softmax.
// A row's weights exp(score - top) and what it accumulates are its own, whatever rows share the
// pass.
#pragma once

#include "add_values.h"
#include "dot_rows.h"
#include "row_kernels.h"

namespace moesd::MOESD_ISA {

constexpr int kSlotBlock = 128;

// Up to Max rows, query by query.
template <class W, int Max>
class AttentionRows {
public:
    static constexpr int kMax = Max;
    int heads = 0, queries = 0;

    explicit AttentionRows(const AttentionArgs& a)
        : a_(a), depth_(align_depth(a.head_dim)), width_(align_depth(a.value_dim)) {}

    int count() const { return heads * queries; }

    // How much of the block of slots from `from` on each query sees.
    void look(const int64_t* positions, int64_t from) {
        common_ = kSlotBlock, most_ = 0;
        for (int n = 0; n < queries; ++n) {
            const int64_t left = positions[n] + 1 - from;
            seen_[n] = left < 0 ? 0 : left < kSlotBlock ? left : kSlotBlock;
            common_ = seen_[n] < common_ ? seen_[n] : common_;
            most_ = seen_[n] > most_ ? seen_[n] : most_;
        }
    }

    void finish(int m, W* out) {
        float* acc = acc_ + m * width_;
        const Vec inverse = splat(1.0f / sum_[m]);
        for (int64_t d = 0; d < a_.value_dim; d += Values<W>::kWide) {
            Vec a = mul(load(acc + d), inverse), b = mul(load(acc + d + kLanes), inverse);
            Values<W>::in_order(a, b);
            store(acc + d, a), store(acc + d + kLanes, b);
        }
        store_row(out, acc, a_.value_dim);
    }

protected:
    using Weight = typename Values<W>::Weight;
    static constexpr int kWeightStride = kSlotBlock * sizeof(float) / sizeof(Weight);

    // Queries that start at q, of heads from `head` on.
    void start_rows(const W* q, int64_t head) {
        for (int m = 0; m < count(); ++m) {
            pack_row(q + m / heads * a_.q_query + m % heads * a_.q_head, a_.head_dim,
                     query_ + m * depth_);
            top_[m] = a_.sinks ? a_.sinks[head + m % heads] : -1e30f;
            sum_[m] = a_.sinks ? 1.0f : 0.0f;
        }
        std::memset(acc_, 0, count() * width_ * sizeof(float));
    }

    // Turns a block's scores into weights exp(score - top) and scales what was accumulated to the
    // new maximum.
    void rescale(int m, int64_t slots) {
        float* scores = scores_ + m * kSlotBlock;
        const int64_t padded = (slots + kLanes - 1) / kLanes * kLanes;
        for (int64_t i = slots; i < padded; ++i) scores[i] = scores[0];  // changes no maximum
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
        for (int64_t i = slots; i < padded; ++i) weights[i] = Weight{};
        Vec sums = splat(0.0f);  // of the weights as they were rounded
        for (int64_t i = 0; i < padded; i += kLanes) sums = add(sums, load(weights + i));
        sum_[m] += sum_lanes(sums);
    }

    // A row's weights take the place of its scores: none is wider.
    Weight* weights_of(int m) { return reinterpret_cast<Weight*>(scores_ + m * kSlotBlock); }

    const AttentionArgs& a_;
    const int64_t depth_, width_;
    // Slots of the current block that every query sees, that any does, and that each does.
    int64_t common_ = 0, most_ = 0;
    int64_t seen_[Max];
    float top_[Max], sum_[Max];
    alignas(64) typename Dot<W>::Act query_[Max * align_depth(kMaxHeadDim)];
    alignas(64) float acc_[Max * align_depth(kMaxHeadDim)];  // in the order of Values
    alignas(64) float scores_[Max * kSlotBlock];
};

template <class W>
class VectorRows : public AttentionRows<W, 24> {
    using Base = AttentionRows<W, 24>;
    using Base::a_, Base::common_, Base::most_, Base::seen_, Base::scores_, Base::width_;

public:
    using Base::Base, Base::heads, Base::queries;

    void start(const W* q, int64_t head) {
        Base::start_rows(q, head);
        for (int m = 0; m < Base::count(); ++m) xs_[m] = Base::query_ + m * Base::depth_;
    }

    // Scores of slots that a query may not see are computed with the others' and never looked at.
    // Values are added to all queries together only as far as all may see them, then to each by
    // itself, so that nothing hidden reaches a sum.
    void add_block(const W* keys, const W* values, bool ends) {
        const int rows = Base::count();
        dot_rows<W>(xs_, rows, keys, a_.k_slot, most_, a_.head_dim,
                    ends ? nullptr : keys + most_ * a_.k_slot, scores_, kSlotBlock);
        for (int m = 0; m < rows; ++m) {
            if (seen_[m / heads] > 0) Base::rescale(m, seen_[m / heads]);
        }
        const int64_t common = common_ / Values<W>::kTogether * Values<W>::kTogether;
        add_slots(0, rows, values, 0, common);
        for (int n = 0; n < queries; ++n) {
            if (seen_[n] > common) add_slots(n * heads, heads, values, common, seen_[n]);
        }
    }

private:
    // Adds the values of slots [from, to) of the block to rows m .. m + count.
    void add_slots(int m, int count, const W* values, int64_t from, int64_t to) {
        add_values<W>(Base::acc_ + m * width_, width_, count, Base::weights_of(m) + from,
                      Base::kWeightStride, values + from * a_.v_slot, a_.v_slot, to - from,
                      a_.value_dim);
    }

    const typename Dot<W>::Act* xs_[Base::kMax];
};

}  // namespace moesd::MOESD_ISA
