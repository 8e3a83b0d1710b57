// The experts layer in two passes, of which threads take work items from counters. An item of the
// first pass is a block of an expert's intermediate rows: gate and up projections, then activation.
// An item of the second is a slice of the output's columns, for which one thread adds up the down
// projections of all experts in ascending order. So nothing of size T * K * H is stored, and no sum
// is shared between threads.
#pragma once

#include <cstring>

#include "activation.h"
#include "formats/dot_stored.h"
#include "work.h"

namespace moesd::MOESD_ISA {

constexpr int kBlock = 64;     // weight rows of a block of sums
constexpr int kMaxChunk = 48;  // most tokens of a block of sums
// Activations that stay in a core's second-level cache while a block's weight rows are read.
constexpr int64_t kChunkBytes = 192 * 1024;

// Tokens of a block of sums: whole tiles, as many as kChunkBytes hold, but two tiles at least. All
// that fit where weights are `decoded`, which is then done less often, a block of the depth at a
// time.
inline int chunk_tokens(int64_t row_bytes, bool decoded) {
    if (decoded) return kMaxChunk;
    int64_t fit = kChunkBytes / row_bytes / kTileTokens * kTileTokens;
    return static_cast<int>(fit < 2 * kTileTokens ? 2 * kTileTokens
                            : fit < kMaxChunk     ? fit
                                                  : kMaxChunk);
}

// Columns of a slice of the output. Small enough that there are several slices for each thread, and
// threads end at about the same time; large enough that a slice reads long stretches of weights,
// and the activations of many tokens are not read too often.
inline int64_t output_slice(const ExpertsArgs& a) {
    const int64_t slices = a.tokens <= 16 ? 4 : 2;
    const int64_t rows = a.hidden / (slices * a.threads) / 16 * 16;
    return rows < 16 ? 16 : rows > 256 ? 256 : rows;
}

// Columns h0 .. h1 of the output, added up over experts in fp32. The sums of all tokens are
// adjacent: at the distance of the output's rows they would compete for a few lines of the
// first-level cache.
class OutputSlice {
public:
    OutputSlice(const ExpertsArgs& a, int64_t h0, int64_t h1) : a_(a), h0_(h0), width_(h1 - h0) {
        std::memset(sums(0, h0), 0, a.tokens * width_ * sizeof(float));
    }

    // The sums of token t, of which the first is that of column h.
    float* sums(int64_t t, int64_t h) const {
        return a_.acc + h0_ * a_.tokens + t * width_ + (h - h0_);
    }

    template <class W>
    void store() const {
        for (int64_t t = 0; t < a_.tokens; ++t) {
            store_row(static_cast<W*>(a_.out) + t * a_.hidden + h0_, sums(t, h0_), width_);
        }
    }

private:
    const ExpertsArgs& a_;
    const int64_t h0_, width_;
};

// activation(gate) * up after the clamps; `up` is not used unless the experts are gated.
inline Vec gated_activation(const ExpertsArgs& a, Vec gate, Vec up) {
    if (a.has_limit) {
        gate = min(splat(a.limit), gate);
        if (a.gated) up = min(splat(a.limit), max(splat(-a.limit), up));
    }
    if (a.has_alpha) {
        return mul(add(up, splat(1.0f)), mul(gate, sigmoid(mul(splat(a.alpha), gate))));
    }
    const Vec v = activate(a.activation, gate);
    return a.gated ? mul(v, up) : v;
}

template <class W>
class ExpertsKernel {
    using D = Dot<W>;
    using Act = typename D::Act;

public:
    explicit ExpertsKernel(const ExpertsArgs& a)
        : a_(a),
          depth_x_(align_depth(a.hidden)),
          depth_act_(align_depth(a.inter)),
          up_rows_(a.gated ? 2 * a.inter : a.inter),
          all_gate_up_(a.w_gate_up, a.hidden),
          all_down_(a.w_down, a.inter),
          block_(a.inter <= kBlock && a.threads > 1 ? kDepthAlign : kBlock),
          blocks_((a.inter + block_ - 1) / block_),
          slice_(output_slice(a)),
          pack_(a.tokens, a.threads),
          up_(a.num_active * blocks_),
          down_((a.hidden + slice_ - 1) / slice_) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<ExpertsKernel*>(self)->work(); }, this);
    }

private:
    void work() {
        pack_.share([this](int64_t t) {
            pack_row(static_cast<const W*>(a_.x) + t * a_.hidden, a_.hidden,
                     const_cast<Act*>(packed_x(t)));
        });
        pack_.wait();
        if (a_.enter_phase) a_.enter_phase(a_.phase_ctx, "moesd::gate_up");
        int64_t done = 0, i = up_.take();
        while (i < up_.total) {
            int64_t next_item = up_.take();
            gate_up(i, next_item);
            i = next_item, ++done;
        }
        up_.finish(done), up_.wait();
        if (a_.enter_phase) a_.enter_phase(a_.phase_ctx, "moesd::down_combine");
        while ((i = down_.take()) < down_.total) down(i);
    }

    const Act* packed_x(int64_t t) const {
        return reinterpret_cast<const Act*>(a_.packed_x) + t * depth_x_;
    }
    const Act* packed_act(int64_t n) const {
        return reinterpret_cast<const Act*>(a_.packed_act) + n * depth_act_;
    }
    Matrix<W> gate_up_of(int64_t i) const {
        return all_gate_up_.nth(a_.active[i], a_.transposed ? a_.hidden : up_rows_);
    }
    Matrix<W> down_of(int64_t i) const {
        return all_down_.nth(a_.active[i], a_.transposed ? a_.inter : a_.hidden);
    }

    // The first weights of a gate/up item; after the last item those of the down projection.
    const uint8_t* first_row(int64_t item) const {
        if (item >= up_.total) return down_of(0).row(0);
        return gate_up_of(item / blocks_).row(item % blocks_ * block_);
    }

    void gate_up(int64_t item, int64_t next_item) {
        const int64_t e = item / blocks_, j = item % blocks_ * block_;
        const int64_t rows = a_.inter - j < block_ ? a_.inter - j : block_;
        const int limit = chunk_tokens(depth_x_ * sizeof(Act), all_gate_up_.decoder.runs);
        const Act* xs[kMaxChunk];
        alignas(64) float gate[kMaxChunk * kBlock], up[kMaxChunk * kBlock];
        for (int64_t n = a_.offsets[e]; n < a_.offsets[e + 1]; n += limit) {
            const int count =
                static_cast<int>(a_.offsets[e + 1] - n < limit ? a_.offsets[e + 1] - n : limit);
            for (int m = 0; m < count; ++m) xs[m] = packed_x(a_.sorted_token[n + m]);
            project_gate_up(xs, count, e, j, rows, first_row(next_item), gate, up);
            for (int m = 0; m < count; ++m) {
                finish_row(e, j, rows, gate + m * kBlock, up + m * kBlock);
                Act* act = const_cast<Act*>(packed_act(n + m)) + j;
                for (int64_t k = 0; k < rows; k += D::kStep) {
                    D::pack_step(gate + m * kBlock + k, act + k);
                }
                // Whoever computes a row's last block clears its padding, up to align_depth.
                if (j + rows == a_.inter) {
                    int64_t end = (rows + D::kStep - 1) / D::kStep * D::kStep;
                    std::memset(act + end, 0, (depth_act_ - j - end) * sizeof(Act));
                }
            }
        }
    }

    void project_gate_up(const Act* const* xs, int count, int64_t e, int64_t j, int64_t rows,
                         const uint8_t* next, float* gate, float* up) const {
        const Matrix<W> matrix = gate_up_of(e);
        const int64_t depth = a_.hidden, step = a_.interleaved ? 2 : 1;
        const int64_t first = j * step, second = a_.interleaved ? j * 2 + 1 : a_.inter + j;
        if (!a_.transposed) {
            const RowsOf<W> gates{matrix, first, step}, ups{matrix, second, step};
            dot_stored<W>(xs, count, gates, rows, a_.gated ? ups.address(0) : next, gate, kBlock);
            if (a_.gated) dot_stored<W>(xs, count, ups, rows, next, up, kBlock);
            return;
        }
        const W* w = static_cast<const W*>(matrix.stored.data);
        if (!a_.interleaved) {
            dot_columns(xs, count, w + first, up_rows_, rows, depth, gate, kBlock);
            if (a_.gated) dot_columns(xs, count, w + second, up_rows_, rows, depth, up, kBlock);
        } else {
            for (int m = 0; m < count; ++m) {
                float both[2 * kBlock];
                dot_columns(xs + m, 1, w + first, up_rows_, 2 * rows, depth, both, 2 * kBlock);
                for (int64_t i = 0; i < rows; ++i) {
                    gate[m * kBlock + i] = both[2 * i], up[m * kBlock + i] = both[2 * i + 1];
                }
            }
        }
    }

    // gate[0:rows] = activation(gate) * up after biases and clamps; lanes past rows become zero.
    void finish_row(int64_t e, int64_t j, int64_t rows, float* gate, float* up) const {
        const int64_t padded = (rows + D::kStep - 1) / D::kStep * D::kStep;
        if (a_.gate_up_bias) {
            const W* bias = static_cast<const W*>(a_.gate_up_bias) + a_.active[e] * up_rows_;
            for (int64_t i = 0; i < rows; ++i) {
                gate[i] += widened(bias[a_.interleaved ? 2 * (j + i) : j + i]);
                if (a_.gated) {
                    up[i] += widened(bias[a_.interleaved ? 2 * (j + i) + 1 : a_.inter + j + i]);
                }
            }
        }
        for (int64_t i = rows; i < padded; ++i) gate[i] = up[i] = 0.0f;
        for (int64_t i = 0; i < padded; i += kLanes) {
            store(gate + i,
                  gated_activation(a_, load(gate + i), a_.gated ? load(up + i) : splat(1.0f)));
        }
        for (int64_t i = rows; i < padded; ++i) gate[i] = 0.0f;
    }

    void down(int64_t item) {
        const int64_t h0 = item * slice_, h1 = h0 + slice_ < a_.hidden ? h0 + slice_ : a_.hidden;
        const OutputSlice out(a_, h0, h1);
        for (int64_t e = 0; e < a_.num_active; ++e) {
            const Matrix<W> matrix = down_of(e);
            const uint8_t* next_expert = e + 1 < a_.num_active ? down_of(e + 1).row(h0) : nullptr;
            for (int64_t h = h0; h < h1; h += kBlock) {
                const int64_t rows = h1 - h < kBlock ? h1 - h : kBlock;
                down_block(e, matrix, h, rows, out,
                           h + kBlock < h1 ? matrix.row(h + kBlock) : next_expert);
            }
        }
        out.template store<W>();
    }

    void down_block(int64_t e, const Matrix<W>& matrix, int64_t h, int64_t rows,
                    const OutputSlice& out, const uint8_t* next) {
        const int limit = chunk_tokens(depth_act_ * sizeof(Act), all_down_.decoder.runs);
        const Act* xs[kMaxChunk];
        alignas(64) float sums[kMaxChunk * kBlock];
        float bias[kBlock] = {};
        if (a_.down_bias) {
            load_row(bias, static_cast<const W*>(a_.down_bias) + a_.active[e] * a_.hidden + h,
                     rows);
        }
        for (int64_t n = a_.offsets[e]; n < a_.offsets[e + 1]; n += limit) {
            const int count =
                static_cast<int>(a_.offsets[e + 1] - n < limit ? a_.offsets[e + 1] - n : limit);
            for (int m = 0; m < count; ++m) xs[m] = packed_act(n + m);
            if (a_.transposed) {
                dot_columns(xs, count, static_cast<const W*>(matrix.stored.data) + h, a_.hidden,
                            rows, a_.inter, sums, kBlock);
            } else {
                dot_stored<W>(xs, count, {matrix, h, 1}, rows, next, sums, kBlock);
            }
            for (int m = 0; m < count; ++m) {
                float* acc = out.sums(a_.sorted_token[n + m], h);
                const float weight = a_.sorted_weight[n + m];
                for (int64_t i = 0; i < rows; ++i) {
                    acc[i] += weight * (sums[m * kBlock + i] + bias[i]);
                }
            }
        }
    }

    const ExpertsArgs& a_;
    const int64_t depth_x_, depth_act_, up_rows_;
    const Matrix<W> all_gate_up_, all_down_;
    const int64_t block_, blocks_, slice_;
    Rows pack_;
    Counter up_, down_;
};

}  // namespace moesd::MOESD_ISA
