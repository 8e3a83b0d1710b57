// Attention of a few queries per sequence over a ragged KV cache: a query at position p reads slots
// max(0, p - window + 1) .. p of its own row and nothing else, so garbage beyond a row's length is never touched. Online
// softmax in fp32 over blocks of slots counted from the first visible one; heads sharing keys are read together.
#pragma once

#include "dot.h"
#include "experts_kernel.h"

namespace moesd::MOESD_ISA {

constexpr int kSlotBlock = 128;
constexpr int kMaxHeads = 12;        // query heads handled at a time
constexpr int64_t kMaxHeadDim = 576;

template <class W>
class AttentionKernel {
    using Act = typename Dot<W>::Act;
    static constexpr int kWide = 2 * kLanes;

public:
    explicit AttentionKernel(const AttentionArgs& a)
        : a_(a), group_(a.q_heads / a.kv_heads), items_(a.batch * a.kv_heads * a.queries) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<AttentionKernel*>(self)->work(); }, this);
    }

private:
    // State of the online softmax for up to kMaxHeads heads of one query; `acc` is in pack order.
    struct State {
        alignas(64) Act query[kMaxHeads * kMaxHeadDim];
        alignas(64) float acc[kMaxHeads * kMaxHeadDim];
        alignas(64) float scores[kMaxHeads * kSlotBlock];
        float top[kMaxHeads], sum[kMaxHeads];
    };

    void work() {
        State state;
        for (int64_t i; (i = items_.take()) < items_.total;) {
            const int64_t j = i % a_.queries, h = i / a_.queries % a_.kv_heads, b = i / a_.queries / a_.kv_heads;
            for (int64_t g = 0; g < group_; g += kMaxHeads) {
                attend(b, j, h, g, static_cast<int>(group_ - g < kMaxHeads ? group_ - g : kMaxHeads), state);
            }
        }
    }

    void attend(int64_t b, int64_t j, int64_t h, int64_t g, int heads, State& s) const {
        const int64_t position = a_.positions[b * a_.queries + j], head = h * group_ + g;
        W* out = static_cast<W*>(a_.out) + ((b * a_.queries + j) * a_.q_heads + head) * a_.value_dim;
        if (position < 0) {
            std::memset(static_cast<void*>(out), 0, heads * a_.value_dim * sizeof(W));
            return;
        }
        const int64_t depth = align_depth(a_.head_dim), width = align_depth(a_.value_dim);
        const int64_t row = a_.rows ? a_.rows[b] : b;
        const int64_t first = a_.window > 0 && position >= a_.window ? position - a_.window + 1 : 0;
        const W* q = static_cast<const W*>(a_.q) + b * a_.q_batch + j * a_.q_query + head * a_.q_head;
        const W* keys = static_cast<const W*>(a_.k) + row * a_.k_row + h * a_.k_head;
        const W* values = static_cast<const W*>(a_.v) + row * a_.v_row + h * a_.v_head;
        const Act* xs[kMaxHeads];
        for (int m = 0; m < heads; ++m) {
            pack_row(q + m * a_.q_head, a_.head_dim, s.query + m * depth);
            xs[m] = s.query + m * depth;
            s.top[m] = a_.sinks ? a_.sinks[head + m] : -1e30f;
            s.sum[m] = a_.sinks ? 1.0f : 0.0f;
        }
        std::memset(s.acc, 0, heads * width * sizeof(float));
        for (int64_t from = first; from <= position; from += kSlotBlock) {
            const int64_t slots = position + 1 - from < kSlotBlock ? position + 1 - from : kSlotBlock;
            dot_rows<W>(xs, heads, keys + from * a_.k_slot, a_.k_slot, slots, a_.head_dim, nullptr, s.scores,
                        kSlotBlock);
            for (int m = 0; m < heads; ++m) rescale(s, m, slots, width);
            add_values(s, heads, values + from * a_.v_slot, slots, width);
        }
        for (int m = 0; m < heads; ++m) finish(s.acc + m * width, s.sum[m], out + m * a_.value_dim);
    }

    // Turns a block's scores into exp(score - top) and scales what was accumulated to the new maximum.
    void rescale(State& s, int m, int64_t slots, int64_t width) const {
        float* scores = s.scores + m * kSlotBlock;
        float top = s.top[m];
        for (int64_t i = 0; i < slots; ++i) {
            scores[i] *= a_.scale;
            top = scores[i] > top ? scores[i] : top;
        }
        alignas(64) float factor[kLanes];
        store(factor, exp(splat(s.top[m] - top)));
        if (s.top[m] != top) {
            for (int64_t d = 0; d < width; ++d) s.acc[m * width + d] *= factor[0];
            s.sum[m] *= factor[0];
        }
        s.top[m] = top;
        for (int64_t i = 0; i < slots; i += kLanes) {
            store(scores + i, exp(sub(load(scores + i), splat(top))));
        }
        for (int64_t i = 0; i < slots; ++i) s.sum[m] += scores[i];
    }

    void add_values(State& s, int heads, const W* values, int64_t slots, int64_t width) const {
        int m = 0;
        for (; m + 3 <= heads; m += 3) add_values_of<3, 1>(s, m, values, slots, width);
        if (m + 2 <= heads) add_values_of<2, 2>(s, m, values, slots, width), m += 2;
        if (m < heads) add_values_of<1, 4>(s, m, values, slots, width);
    }

    template <int M, int P>
    void add_values_of(State& s, int m, const W* values, int64_t slots, int64_t width) const {
        int64_t d = 0;
        for (; d + P * kWide <= a_.value_dim; d += P * kWide) {
            add_columns<M, P>(s.acc + m * width + d, width, s.scores + m * kSlotBlock, values + d, slots, kWide);
        }
        for (; d < a_.value_dim; d += kWide) {
            const int64_t columns = a_.value_dim - d < kWide ? a_.value_dim - d : kWide;
            add_columns<M, 1>(s.acc + m * width + d, width, s.scores + m * kSlotBlock, values + d, slots, columns);
        }
    }

    // acc[m] += sum over slots, ascending, of scores[m][slot] * values[slot], for M heads and P pairs of vectors.
    template <int M, int P>
    void add_columns(float* acc, int64_t width, const float* scores, const W* values, int64_t slots,
                     int64_t columns) const {
        Vec low[M][P], high[M][P];
        for (int m = 0; m < M; ++m) {
            for (int p = 0; p < P; ++p) {
                low[m][p] = load(acc + m * width + p * kWide), high[m][p] = load(acc + m * width + p * kWide + kLanes);
            }
        }
        for (int64_t i = 0; i < slots; ++i) {
            const W* v = values + i * a_.v_slot;
            alignas(64) W tail[kWide];
            if (columns < kWide) {
                std::memset(static_cast<void*>(tail), 0, sizeof(tail));
                std::memcpy(tail, v, columns * sizeof(W));
                v = tail;
            }
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) {
                const Vec a = load_low(v + p * kWide), b = load_high(v + p * kWide);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const Vec weight = splat(scores[m * kSlotBlock + i]);
                    low[m][p] = fma(weight, a, low[m][p]), high[m][p] = fma(weight, b, high[m][p]);
                }
            }
        }
        for (int m = 0; m < M; ++m) {
            for (int p = 0; p < P; ++p) {
                store(acc + m * width + p * kWide, low[m][p]), store(acc + m * width + p * kWide + kLanes, high[m][p]);
            }
        }
    }

    void finish(float* acc, float sum, W* out) const {
        const Vec inverse = splat(1.0f / sum);
        for (int64_t d = 0; d < a_.value_dim; d += kWide) {
            Vec a = mul(load(acc + d), inverse), b = mul(load(acc + d + kLanes), inverse);
            from_pack_order(out, a, b);
            store(acc + d, a), store(acc + d + kLanes, b);
        }
        store_row(out, acc, a_.value_dim);
    }

    const AttentionArgs& a_;
    const int64_t group_;
    Counter items_;
};

}  // namespace moesd::MOESD_ISA
