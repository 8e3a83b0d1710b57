// Attention of a few queries per sequence over a ragged KV cache: a query at position p reads slots
// max(0, p - window + 1) .. p of its own row and nothing else, so garbage beyond a row's length is
// never touched. Online softmax in fp32 over blocks of slots counted from the first visible one;
// the queries and heads of a sequence that share keys read them together.
#pragma once

#include "attention_rows.h"
#include "work.h"

namespace moesd::MOESD_ISA {

// `Rows` hold what passes over the keys together: an AttentionRows with start() and add_block().
template <class W, class Rows>
class RaggedAttention {
    static constexpr int kMaxRows = Rows::kMax;

public:
    explicit RaggedAttention(const AttentionArgs& a)
        : a_(a),
          group_(a.q_heads / a.kv_heads),
          heads_(group_ < kMaxRows ? group_ : kMaxRows),
          // Sharing a pass over the keys is worth less than an idle thread.
          span_(a.batch * a.kv_heads < a.threads ? 1 : kMaxRows / heads_),
          spans_((a.queries + span_ - 1) / span_),
          items_(a.batch * a.kv_heads * spans_) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<RaggedAttention*>(self)->work(); }, this);
    }

private:
    void work() {
        Rows rows(a_);
        for (int64_t i; (i = items_.take()) < items_.total;) {
            const int64_t h = i / spans_ % a_.kv_heads, b = i / spans_ / a_.kv_heads,
                          from = i % spans_ * span_;
            const int64_t end = from + span_ < a_.queries ? from + span_ : a_.queries;
            for (int64_t g = 0; g < group_; g += heads_) {
                rows.heads = static_cast<int>(group_ - g < heads_ ? group_ - g : heads_);
                for (int64_t j = from; j < end; j += rows.queries) {
                    rows.queries = 1;
                    while (j + rows.queries < end &&
                           first_slot(b, j) == first_slot(b, j + rows.queries)) {
                        ++rows.queries;
                    }
                    attend(b, j, h, h * group_ + g, rows);
                }
            }
        }
    }

    // Blocks of slots are counted from here, so only queries that agree on it can share a pass; -1
    // sees nothing.
    int64_t first_slot(int64_t b, int64_t j) const {
        const int64_t position = a_.positions[b * a_.queries + j];
        if (position < 0) return -1;
        return a_.window > 0 && position >= a_.window ? position - a_.window + 1 : 0;
    }

    // Queries from j on of sequence b and heads from `head` on, over the keys of head h.
    void attend(int64_t b, int64_t j, int64_t h, int64_t head, Rows& rows) const {
        const int64_t first = first_slot(b, j), row = a_.rows ? a_.rows[b] : b;
        const int64_t* positions = a_.positions + b * a_.queries + j;
        const W* keys = static_cast<const W*>(a_.k) + row * a_.k_row + h * a_.k_head;
        const W* values = static_cast<const W*>(a_.v) + row * a_.v_row + h * a_.v_head;
        if (first < 0) {  // padding sees nothing: there is no slot before the first
            for (int m = 0; m < rows.count(); ++m) {
                std::memset(static_cast<void*>(out_row(b, j, head, m, rows)), 0,
                            a_.value_dim * sizeof(W));
            }
            return;
        }
        rows.start(static_cast<const W*>(a_.q) + b * a_.q_batch + j * a_.q_query + head * a_.q_head,
                   head);
        int64_t last = -1;
        for (int n = 0; n < rows.queries; ++n) last = positions[n] > last ? positions[n] : last;
        for (int64_t from = first; from <= last; from += kSlotBlock) {
            rows.look(positions, from);
            rows.add_block(keys + from * a_.k_slot, values + from * a_.v_slot,
                           from + kSlotBlock > last);
        }
        for (int m = 0; m < rows.count(); ++m) rows.finish(m, out_row(b, j, head, m, rows));
    }

    // The output of row m of a pass over queries from j on and heads from `head` on.
    W* out_row(int64_t b, int64_t j, int64_t head, int m, const Rows& rows) const {
        const int64_t query = b * a_.queries + j + m / rows.heads;
        return static_cast<W*>(a_.out) +
               (query * a_.q_heads + head + m % rows.heads) * a_.value_dim;
    }

    const AttentionArgs& a_;
    const int64_t group_, heads_, span_, spans_;
    Counter items_;
};

template <class W>
using AttentionKernel = RaggedAttention<W, VectorRows<W>>;

}  // namespace moesd::MOESD_ISA
