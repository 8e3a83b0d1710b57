// Attention of a few queries per sequence over a ragged KV cache: a query at position p reads
// positions max(0, p - window + 1) .. p of its own cache row and nothing else, so garbage beyond a
// row's length is never touched. Online softmax in fp32 over blocks of positions, of which the
// first begins at the first visible position; the queries and heads of a sequence that share keys
// read them together.
#pragma once

#include "attention_rows.h"
#include "work.h"

namespace moesd::MOESD_ISA {

// `Rows` is an AttentionRows with start() and add_block(): the (query, head) rows of one pass over
// the keys. A work item is a span of up to span_ queries of one sequence with one of its key heads.
// A thread takes one, or all of a sequence where sequences are many and short: what prefetchers
// bring of the neighbouring heads is then in the second-level cache that looks for it.
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
          run_(takes_sequences() ? a.kv_heads * spans_ : 1),
          runs_(a.batch * a.kv_heads * spans_ / run_) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<RaggedAttention*>(self)->work(); }, this);
    }

private:
    // Keys and values of a sequence that a second-level cache holds beside much else.
    static constexpr int64_t kSequenceBytes = 512 << 10;

    bool takes_sequences() const {
        if (a_.batch < 4 * a_.threads) return false;
        int64_t longest = 0;
        for (int64_t i = 0; i < a_.batch * a_.queries; ++i) {
            longest = a_.positions[i] > longest ? a_.positions[i] : longest;
        }
        const int64_t values = a_.kv_heads * (a_.head_dim + a_.value_dim);
        return (longest + 1) * values * static_cast<int64_t>(sizeof(W)) <= kSequenceBytes;
    }

    void work() {
        Rows rows(a_);
        int64_t run = runs_.take();
        while (run < runs_.total) {
            const int64_t next = runs_.take();
            if constexpr (Rows::kFetchesNext) expect(next, rows);
            for (int64_t i = run * run_; i < (run + 1) * run_; ++i) attend_span(i, rows);
            run = next;
        }
    }

    // While a sequence is computed, the keys and values of the thread's next one come: those of all
    // heads, which lie together.
    void expect(int64_t b, Rows& rows) const {
        const bool is_sequence = run_ > 1 && b < runs_.total;
        const int64_t first = is_sequence ? first_position(b, 0) : -1;
        const int64_t last = is_sequence ? a_.positions[(b + 1) * a_.queries - 1] : -1;
        if (first < 0 || last < first) return rows.expect_nothing();
        const int64_t row = a_.rows ? a_.rows[b] : b, positions = last + 1 - first;
        const int64_t fetches = a_.kv_heads * Rows::fetches(a_.queries * group_, positions);
        rows.expect(static_cast<const W*>(a_.k) + row * a_.k_row + first * a_.k_position,
                    static_cast<const W*>(a_.v) + row * a_.v_row + first * a_.v_position,
                    positions * a_.k_position, fetches);
    }

    void attend_span(int64_t item, Rows& rows) const {
        const int64_t h = item / spans_ % a_.kv_heads, b = item / spans_ / a_.kv_heads;
        const int64_t start = item % spans_ * span_;
        const int64_t end = start + span_ < a_.queries ? start + span_ : a_.queries;
        for (int64_t g = 0; g < group_; g += heads_) {
            rows.heads = static_cast<int>(group_ - g < heads_ ? group_ - g : heads_);
            for (int64_t j = start; j < end; j += rows.queries) {
                rows.queries = 1;
                while (j + rows.queries < end &&
                       first_position(b, j) == first_position(b, j + rows.queries)) {
                    ++rows.queries;
                }
                attend(b, j, h, h * group_ + g, rows);
            }
        }
    }

    // The first position that query j of sequence b sees, -1 where it is padding and sees none. The
    // blocks of a pass begin here, so only queries that have it in common can share a pass.
    int64_t first_position(int64_t b, int64_t j) const {
        const int64_t position = a_.positions[b * a_.queries + j];
        if (position < 0) return -1;
        return a_.window > 0 && position >= a_.window ? position - a_.window + 1 : 0;
    }

    // One pass: rows.queries queries of sequence b, the first of them j, with rows.heads query
    // heads, the first of them `head`, over the keys and values of key head h.
    void attend(int64_t b, int64_t j, int64_t h, int64_t head, Rows& rows) const {
        const int64_t first = first_position(b, j), row = a_.rows ? a_.rows[b] : b;
        const int64_t* positions = a_.positions + b * a_.queries + j;
        const W* keys = static_cast<const W*>(a_.k) + row * a_.k_row + h * a_.k_head;
        const W* values = static_cast<const W*>(a_.v) + row * a_.v_row + h * a_.v_head;
        if (first < 0) {  // padding sees nothing, and its output is zero
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
        for (int64_t start = first; start <= last; start += kBlockPositions) {
            rows.count_visible(positions, start);
            rows.add_block(keys + start * a_.k_position, values + start * a_.v_position,
                           start + kBlockPositions > last);
        }
        for (int m = 0; m < rows.count(); ++m) rows.finish(m, out_row(b, j, head, m, rows));
    }

    // The output of row m of the pass whose first query is j and whose first head is `head`.
    W* out_row(int64_t b, int64_t j, int64_t head, int m, const Rows& rows) const {
        const int64_t query = b * a_.queries + j + m / rows.heads;
        return static_cast<W*>(a_.out) +
               (query * a_.q_heads + head + m % rows.heads) * a_.value_dim;
    }

    const AttentionArgs& a_;
    const int64_t group_, heads_, span_, spans_;
    const int64_t run_;  // items that a thread takes at a time
    Counter runs_;
};

template <class W>
using AttentionKernel = RaggedAttention<W, VectorRows<W>>;

}  // namespace moesd::MOESD_ISA
