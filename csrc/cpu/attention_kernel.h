// Attention of a few queries per sequence over a ragged KV cache: a query at position p reads slots
// max(0, p - window + 1) .. p of its own row and nothing else, so garbage beyond a row's length is never touched. Online
// softmax in fp32 over blocks of slots counted from the first visible one; the queries and heads of a sequence that share
// keys read them together.
#pragma once

#include "add_values.h"
#include "dot_rows.h"
#include "experts_kernel.h"
#include "row_kernels.h"

namespace moesd::MOESD_ISA {

constexpr int kSlotBlock = 128;
constexpr int kMaxRows = 24;  // (query, head) rows that pass over the keys together

template <class W>
class AttentionKernel {
    using Act = typename Dot<W>::Act;
    using Weight = typename Values<W>::Weight;
    static constexpr int kWide = Values<W>::kWide;
    static constexpr int kWeightStride = kSlotBlock * sizeof(float) / sizeof(Weight);

public:
    explicit AttentionKernel(const AttentionArgs& a)
        : a_(a),
          group_(a.q_heads / a.kv_heads),
          heads_(group_ < kMaxRows ? group_ : kMaxRows),
          // Sharing a pass over the keys is worth less than an idle thread.
          span_(a.batch * a.kv_heads < a.threads ? 1 : kMaxRows / heads_),
          spans_((a.queries + span_ - 1) / span_),
          items_(a.batch * a.kv_heads * spans_) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<AttentionKernel*>(self)->work(); }, this);
    }

private:
    // Rows of one pass, query by query, and their online softmax; `acc` is in the order of Values.
    struct State {
        alignas(64) Act query[kMaxRows * align_depth(kMaxHeadDim)];
        alignas(64) float acc[kMaxRows * align_depth(kMaxHeadDim)];
        alignas(64) float scores[kMaxRows * kSlotBlock];
        const Act* xs[kMaxRows];
        float top[kMaxRows], sum[kMaxRows];
        int64_t seen[kMaxRows];  // by query: the slots of the current block that it may read
        int heads, queries;
    };

    void work() {
        State state;
        for (int64_t i; (i = items_.take()) < items_.total;) {
            const int64_t h = i / spans_ % a_.kv_heads, b = i / spans_ / a_.kv_heads, from = i % spans_ * span_;
            const int64_t end = from + span_ < a_.queries ? from + span_ : a_.queries;
            for (int64_t g = 0; g < group_; g += heads_) {
                state.heads = static_cast<int>(group_ - g < heads_ ? group_ - g : heads_);
                for (int64_t j = from; j < end; j += state.queries) {
                    state.queries = 1;
                    while (j + state.queries < end && first_slot(b, j) == first_slot(b, j + state.queries)) {
                        ++state.queries;
                    }
                    attend(b, j, h, g, state);
                }
            }
        }
    }

    // Blocks of slots are counted from here, so only queries that agree on it can share a pass; -1 sees nothing.
    int64_t first_slot(int64_t b, int64_t j) const {
        const int64_t position = a_.positions[b * a_.queries + j];
        if (position < 0) return -1;
        return a_.window > 0 && position >= a_.window ? position - a_.window + 1 : 0;
    }

    void attend(int64_t b, int64_t j, int64_t h, int64_t g, State& s) const {
        const int64_t head = h * group_ + g, first = first_slot(b, j), width = align_depth(a_.value_dim);
        const int64_t* positions = a_.positions + b * a_.queries + j;
        const int64_t row = a_.rows ? a_.rows[b] : b;
        const W* keys = static_cast<const W*>(a_.k) + row * a_.k_row + h * a_.k_head;
        const W* values = static_cast<const W*>(a_.v) + row * a_.v_row + h * a_.v_head;
        if (first < 0) {  // padding sees nothing: there is no slot before the first
            for (int m = 0; m < s.queries * s.heads; ++m) {
                std::memset(static_cast<void*>(out_row(b, j, head, m, s)), 0, a_.value_dim * sizeof(W));
            }
            return;
        }
        start(b, j, head, s);
        int64_t last = -1;
        for (int n = 0; n < s.queries; ++n) last = positions[n] > last ? positions[n] : last;
        for (int64_t from = first; from <= last; from += kSlotBlock) {
            int64_t common = kSlotBlock, most = 0;
            for (int n = 0; n < s.queries; ++n) {
                const int64_t left = positions[n] + 1 - from;
                s.seen[n] = left < 0 ? 0 : left < kSlotBlock ? left : kSlotBlock;
                common = s.seen[n] < common ? s.seen[n] : common, most = s.seen[n] > most ? s.seen[n] : most;
            }
            attend_block(keys + from * a_.k_slot, values + from * a_.v_slot, common, most, from + kSlotBlock > last,
                         width, s);
        }
        for (int m = 0; m < s.queries * s.heads; ++m) finish(s.acc + m * width, s.sum[m], out_row(b, j, head, m, s));
    }

    // The output of row m of a pass over queries from j on and heads from `head` on.
    W* out_row(int64_t b, int64_t j, int64_t head, int m, const State& s) const {
        const int64_t query = b * a_.queries + j + m / s.heads;
        return static_cast<W*>(a_.out) + (query * a_.q_heads + head + m % s.heads) * a_.value_dim;
    }

    void start(int64_t b, int64_t j, int64_t head, State& s) const {
        const int64_t depth = align_depth(a_.head_dim);
        const W* q = static_cast<const W*>(a_.q) + b * a_.q_batch + j * a_.q_query + head * a_.q_head;
        for (int m = 0; m < s.queries * s.heads; ++m) {
            const int n = m / s.heads, k = m % s.heads;
            pack_row(q + n * a_.q_query + k * a_.q_head, a_.head_dim, s.query + m * depth);
            s.xs[m] = s.query + m * depth;
            s.top[m] = a_.sinks ? a_.sinks[head + k] : -1e30f;
            s.sum[m] = a_.sinks ? 1.0f : 0.0f;
        }
        std::memset(s.acc, 0, s.queries * s.heads * align_depth(a_.value_dim) * sizeof(float));
    }

    // Scores of slots that a query may not see are computed with the others' and never looked at. Values are added to all
    // queries together only as far as all may see them, then to each by itself, so that nothing hidden reaches a sum.
    void attend_block(const W* keys, const W* values, int64_t common, int64_t most, bool ends, int64_t width,
                      State& s) const {
        const int rows = s.queries * s.heads;
        dot_rows<W>(s.xs, rows, keys, a_.k_slot, most, a_.head_dim, ends ? nullptr : keys + most * a_.k_slot, s.scores,
                    kSlotBlock);
        for (int m = 0; m < rows; ++m) {
            if (s.seen[m / s.heads] > 0) rescale(s, m, s.seen[m / s.heads], width);
        }
        common = common / Values<W>::kTogether * Values<W>::kTogether;
        add_slots(s, 0, rows, values, 0, common, width);
        for (int n = 0; n < s.queries; ++n) {
            if (s.seen[n] > common) add_slots(s, n * s.heads, s.heads, values, common, s.seen[n], width);
        }
    }

    // Turns a block's scores into weights exp(score - top) and scales what was accumulated to the new maximum.
    void rescale(State& s, int m, int64_t slots, int64_t width) const {
        float* scores = s.scores + m * kSlotBlock;
        const int64_t padded = (slots + kLanes - 1) / kLanes * kLanes;
        for (int64_t i = slots; i < padded; ++i) scores[i] = scores[0];  // changes no maximum
        Vec tops = splat(s.top[m]);
        for (int64_t i = 0; i < padded; i += kLanes) {
            const Vec scaled = mul(load(scores + i), splat(a_.scale));
            store(scores + i, scaled);
            tops = max(scaled, tops);
        }
        const float top = max_lanes(tops);  // at least s.top[m], which is in every lane
        if (s.top[m] != top) {
            alignas(64) float lanes[kLanes];
            store(lanes, exp(splat(s.top[m] - top)));
            for (int64_t d = 0; d < width; ++d) s.acc[m * width + d] *= lanes[0];
            s.sum[m] *= lanes[0];
            s.top[m] = top;
        }
        Weight* weights = weights_of(s, m);
        for (int64_t i = 0; i < padded; i += kLanes) {
            Values<W>::store_weights(weights + i, exp(sub(load(scores + i), splat(top))));
        }
        for (int64_t i = slots; i < padded; ++i) weights[i] = Weight{};
        Vec sums = splat(0.0f);  // of the weights as they were rounded
        for (int64_t i = 0; i < padded; i += kLanes) sums = add(sums, load(weights + i));
        s.sum[m] += sum_lanes(sums);
    }

    // Adds the values of slots [from, to) of the block to rows m .. m + count.
    void add_slots(State& s, int m, int count, const W* values, int64_t from, int64_t to, int64_t width) const {
        add_values<W>(s.acc + m * width, width, count, weights_of(s, m) + from, kWeightStride,
                      values + from * a_.v_slot, a_.v_slot, to - from, a_.value_dim);
    }

    // A row's weights take the place of its scores: none is wider.
    static Weight* weights_of(State& s, int m) { return reinterpret_cast<Weight*>(s.scores + m * kSlotBlock); }

    void finish(float* acc, float sum, W* out) const {
        const Vec inverse = splat(1.0f / sum);
        for (int64_t d = 0; d < a_.value_dim; d += kWide) {
            Vec a = mul(load(acc + d), inverse), b = mul(load(acc + d + kLanes), inverse);
            Values<W>::in_order(a, b);
            store(acc + d, a), store(acc + d + kLanes, b);
        }
        store_row(out, acc, a_.value_dim);
    }

    const AttentionArgs& a_;
    const int64_t group_, heads_, span_, spans_;
    Counter items_;
};

}  // namespace moesd::MOESD_ISA
