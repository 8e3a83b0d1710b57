// The gated delta rule over ragged rows. The columns of a state are independent of each other, so a
// work item is a block of them, which is read once, taken through all tokens of its row in the
// caches, and written once, behind the last accepted token. Every token is a pass over the block,
// whichever tokens are in the same call.
#pragma once

#include "../../recurrent.h"
#include "../row_kernels.h"

namespace moesd::MOESD_ISA {

template <class W>
class DeltaRuleKernel {
public:
    explicit DeltaRuleKernel(const DeltaRuleArgs& a)
        : a_(a),
          blocks_((a.value_dim + kColumns - 1) / kColumns),
          items_(a.ragged.batch * a.heads * blocks_, a.threads) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<DeltaRuleKernel*>(self)->work(); }, this);
    }

private:
    static constexpr int64_t kColumns = 64;
    // Columns of a pass: their sums, and what is multiplied with them, stay in registers.
    static constexpr int kVecs = kLanes == 16 ? 4 : 2;

    struct Token {
        alignas(64) float query[kMaxHeadDim + kLanes];
        alignas(64) float key[kMaxHeadDim + kLanes];
        alignas(64) float decay[kMaxHeadDim + kLanes];
        alignas(64) float value[kColumns] = {};
        float beta;
    };

    // Some columns of a state, [Dk, columns].
    struct Columns {
        float* first;
        int64_t row;  // floats from a row to the next
    };

    // What a thread needs for its items.
    struct Block {
        alignas(64) float state[kMaxHeadDim * kColumns];
        alignas(64) float padded[kMaxHeadDim * kColumns];
        alignas(64) float recalled[kColumns];  // k S
        alignas(64) float delta[kColumns];
        alignas(64) float out[kColumns];
        Token tokens[2];  // the one at hand and the next one
    };

    void work() {
        Block block;
        items_.share([&](int64_t i) {
            const int64_t column = i % blocks_ * kColumns, h = i / blocks_ % a_.heads;
            advance(i / blocks_ / a_.heads, h, column, block);
        });
    }

    // Takes the columns of head h of sequence b through its tokens.
    void advance(int64_t b, int64_t h, int64_t column, Block& block) const {
        const Ragged& r = a_.ragged;
        const int64_t left = a_.value_dim - column, width = left < kColumns ? left : kColumns;
        W* out = static_cast<W*>(a_.out) + (b * r.tokens * a_.heads + h) * a_.value_dim + column;
        const int64_t out_token = a_.heads * a_.value_dim, count = r.counts[b];
        for (int64_t t = count; t < r.tokens; ++t) {
            std::memset(static_cast<void*>(out + t * out_token), 0, width * sizeof(W));
        }
        if (count == 0) return;
        const int64_t state = (r.rows[b] * a_.heads + h) * a_.key_dim * a_.value_dim;
        const Columns memory{a_.states + state + column, a_.value_dim};
        const Columns trial{block.state, kColumns}, padded{block.padded, kColumns};
        // Passes are over whole vectors: what does not fill them is computed in a copy.
        const bool whole = width % (kVecs * kLanes) == 0;
        const Columns home = whole ? memory : padded;
        if (!whole) {
            std::memset(block.padded, 0, a_.key_dim * kColumns * sizeof(float));
            copy(memory, width, home);
        }
        read_token(b, 0, h, column, width, block.tokens[0]);
        pass<false, true>(block, block.tokens[0], block.tokens[0], width, home, trial);
        for (int64_t t = 0; t < count; ++t) {
            const Token& token = block.tokens[t % 2];
            Token& next = block.tokens[(t + 1) % 2];
            const bool last = t + 1 == count, kept = t + 1 == r.keep[b];
            correct(token, block);
            if (!last) read_token(b, t + 1, h, column, width, next);
            if (kept) {
                pass<true, false>(block, token, next, width, trial, home);
                if (!whole) copy(home, width, memory);
                if (!last) pass<false, true>(block, token, next, width, home, trial);
            } else if (last) {
                pass<true, false>(block, token, next, width, trial, trial);
            } else {
                pass<true, true>(block, token, next, width, trial, trial);
            }
            store_row(out + t * out_token, block.out, width);
        }
    }

    void copy(const Columns& from, int64_t width, const Columns& to) const {
        for (int64_t k = 0; k < a_.key_dim; ++k) {
            std::memcpy(to.first + k * to.row, from.first + k * from.row, width * sizeof(float));
        }
    }

    void read_token(int64_t b, int64_t t, int64_t h, int64_t column, int64_t width,
                    Token& token) const {
        const int64_t D = a_.key_dim, at = (b * a_.ragged.tokens + t) * a_.heads + h;
        const int64_t key = h / (a_.heads / a_.key_heads) * D;
        read_unit(values_of(a_.query, b, t) + key, 1.0f / std::sqrt(static_cast<float>(D)),
                  token.query);
        read_unit(values_of(a_.key, b, t) + key, 1.0f, token.key);
        load_row(token.value, values_of(a_.value, b, t) + h * a_.value_dim + column, width);
        token.beta = a_.beta[at];
        if (a_.decay_per_channel) load_row(token.decay, a_.decay + at * D, D);
        const Vec decay = exp(splat(a_.decay_per_channel ? 0.0f : a_.decay[at]));
        for (int64_t k = 0; k < D; k += kLanes) {
            store(token.decay + k, a_.decay_per_channel ? exp(load(token.decay + k)) : decay);
        }
    }

    static const W* values_of(const TokenValues& v, int64_t b, int64_t t) {
        return static_cast<const W*>(v.data) + b * v.row + t * v.token;
    }

    // out = x / |x| * scale; lanes beyond x are whatever they were.
    void read_unit(const W* x, float scale, float* out) const {
        const Vec factor =
            splat(scale * (1.0f / std::sqrt(sum_lanes(squares_of(x, a_.key_dim)) + 1e-6f)));
        load_row(out, x, a_.key_dim);
        for (int64_t k = 0; k < a_.key_dim; k += kLanes) {
            store(out + k, mul(load(out + k), factor));
        }
    }

    // delta = beta * (value - recalled).
    static void correct(const Token& token, Block& block) {
        for (int64_t c = 0; c < kColumns; c += kLanes) {
            store(block.delta + c,
                  mul(splat(token.beta), sub(load(token.value + c), load(block.recalled + c))));
        }
    }

    // One pass over the block. kUpdate: the state takes in the delta of `token`, and out = q S.
    // kDecay: then it decays as `next` says, and recalled = k S, of the next token.
    template <bool kUpdate, bool kDecay>
    void pass(Block& block, const Token& token, const Token& next, int64_t width,
              const Columns& from, const Columns& to) const {
        for (int64_t c = 0; c < width; c += kVecs * kLanes) {
            Vec delta[kVecs], out[kVecs], recalled[kVecs];
            for (int v = 0; v < kVecs; ++v) {
                delta[v] = load(block.delta + c + v * kLanes);
                out[v] = recalled[v] = splat(0.0f);
            }
            for (int64_t k = 0; k < a_.key_dim; ++k) {
                const float* source = from.first + k * from.row + c;
                float* target = to.first + k * to.row + c;
                const Vec query = splat(token.query[k]), key = splat(token.key[k]);
                const Vec decay = splat(next.decay[k]), next_key = splat(next.key[k]);
                for (int v = 0; v < kVecs; ++v) {
                    Vec s = load(source + v * kLanes);
                    if (kUpdate) s = fma(key, delta[v], s), out[v] = fma(query, s, out[v]);
                    if (kDecay) s = mul(decay, s), recalled[v] = fma(next_key, s, recalled[v]);
                    store(target + v * kLanes, s);
                }
            }
            for (int v = 0; v < kVecs; ++v) {
                if (kUpdate) store(block.out + c + v * kLanes, out[v]);
                if (kDecay) store(block.recalled + c + v * kLanes, recalled[v]);
            }
        }
    }

    const DeltaRuleArgs& a_;
    const int64_t blocks_;
    Rows items_;
};

}  // namespace moesd::MOESD_ISA
