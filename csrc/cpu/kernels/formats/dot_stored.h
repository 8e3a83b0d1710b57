// dot_rows for weights of any format. Those that are not numbers of type X are decoded into a
// buffer that stays in a cache, and then take the way of plain ones: the sums have the bits that
// they have with plain weights of the decoded values.
#pragma once

#include "../dot_rows.h"
#include "decoders.h"

namespace moesd::MOESD_ISA {

// A matrix [rows, depth] of weights.
template <class X>
struct Matrix {
    StoredWeights stored;
    int64_t depth;
    Decoder<X> decoder;

    Matrix(const StoredWeights& weights, int64_t row_depth)
        : stored(weights), depth(row_depth), decoder(decoder_of<X>(weights.format)) {}

    // The matrix that begins after i matrices of `rows` rows.
    Matrix nth(int64_t i, int64_t rows) const {
        const int64_t scale_rows = (rows + stored.rows_per_scale - 1) / stored.rows_per_scale;
        Matrix other = *this;
        other.stored.data = row(i * rows);
        other.stored.scales = scales() + i * scale_rows * stored.scale_row_bytes;
        return other;
    }

    const uint8_t* row(int64_t r) const {
        return static_cast<const uint8_t*>(stored.data) + r * stored.row_bytes;
    }
    const uint8_t* scales() const { return static_cast<const uint8_t*>(stored.scales); }

    StoredRow stored_row(int64_t r) const {
        return {row(r), scales() + r / stored.rows_per_scale * stored.scale_row_bytes, stored.group,
                depth};
    }
};

// Weight rows first, first + step, ... of a matrix.
template <class X>
struct RowsOf {
    const Matrix<X>& matrix;
    int64_t first, step;

    const uint8_t* address(int64_t i) const { return matrix.row(first + i * step); }
    StoredRow row(int64_t i) const { return matrix.stored_row(first + i * step); }
};

// dot_stored for weights that have to be decoded.
template <class X>
class DecodedRows {
    using Act = typename Dot<X>::Act;
    static constexpr int64_t kStride = kKeptStride<X>;
    static constexpr int64_t kMost = 32;  // weight rows of a short depth that are decoded at a time

public:
    DecodedRows(const Act* const* xs, int count, const RowsOf<X>& w, int64_t rows, float* out,
                int64_t ld)
        : xs_(xs),
          count_(count),
          fused_(!kFused<X>             ? 0
                 : count < kFusedTokens ? count
                                        : kFusedTokens),
          w_(w),
          rows_(rows),
          depth_(w.matrix.depth),
          row_bytes_(w.matrix.stored.row_bytes),
          out_(out),
          ld_(ld) {}

    void multiply_short() const {
        alignas(64) X buffer[kMost * kStride];
        for (int64_t j = 0; j < rows_; j += kMost) {
            const int64_t part = rows_ - j < kMost ? rows_ - j : kMost;
            StoredRow rows[kMost];
            for (int64_t i = 0; i < part; ++i) rows[i] = w_.row(j + i);
            w_.matrix.decoder.runs(rows, part, 0, depth_, buffer, kStride);
            dot_rows<X>(xs_, count_, buffer, kStride, part, depth_, nullptr, out_ + j, ld_);
        }
    }

    // A group of four rows at a time, as plain weights are taken: where the activation rows are
    // few, along whole weight rows; where they are more, all groups of a block of the depth, so
    // that the activations of that block stay in a cache.
    void multiply(const uint8_t* next) const {
        const int64_t depth_step = others(0).block, end = others(0).whole;
        const int64_t quarter = (rows_ + 3) / 4;
        const int64_t per_visit = count_ <= kTileTokens ? 1 : quarter;
        for (int64_t first = 0; first < quarter; first += per_visit) {
            for (int64_t k0 = 0; k0 == 0 || k0 < end; k0 += depth_step) {
                for (int64_t g = first; g < first + per_visit; ++g) {
                    visit(k0, g, quarter, next);
                }
            }
        }
        for (int m = 0; m < count_; ++m) sort_quarters(out_ + m * ld_, quarter);
    }

private:
    // The activation rows that are not multiplied while weights are decoded, with group g alone.
    GroupedRows<X> others(int64_t g) const {
        return {xs_ + fused_,
                count_ - fused_,
                tiles_of(count_ - fused_),
                kStride,
                4,
                depth_,
                out_ + fused_ * ld_ + 4 * g,
                ld_};
    }

    void visit(int64_t k0, int64_t g, int64_t quarter, const uint8_t* next) const {
        alignas(64) X buffer[4 * kStride];
        const GroupedRows<X> rest = others(g);
        const bool last = k0 + rest.block >= rest.whole;
        const int64_t length = last ? depth_ - k0 : rest.block;
        StoredRow rows[4];
        for (int64_t n = 0; n < 4; ++n) {
            const int64_t row = g + n * quarter < rows_ ? g + n * quarter : rows_ - 1;
            rows[n] = w_.row(row);
        }
        const int64_t ahead = bytes_ahead(g, quarter, last ? next : nullptr);
        X* const decoded = buffer + k0 % kRun;
        Prefetch prefetch = nothing();
        if constexpr (kFused<X>) {
            w_.matrix.decoder.fused(count_, xs_, rows, k0, length, ahead, decoded, out_ + 4 * g,
                                    ld_);
        } else {
            w_.matrix.decoder.runs(rows, 4, k0 - k0 % kRun, length + k0 % kRun, buffer, kStride);
            prefetch = in_quarters(rows[0].data + k0 * row_bytes_ / depth_ + ahead, quarter);
        }
        if (rest.count == 0) return;
        rest.visit(decoded, k0, 0, 0, rest.tiles,
                   [&](int t) { return t == 0 ? prefetch : nothing(); });
    }

    // Bytes from group g to one that is used a while later: of these rows or of the `next`.
    int64_t bytes_ahead(int64_t g, int64_t quarter, const uint8_t* next) const {
        const int64_t groups = row_bytes_ > 0 ? (kFarBytes + row_bytes_ - 1) / row_bytes_ : 1;
        const int64_t distance = w_.step * row_bytes_;
        if (g + groups < quarter) return groups * distance;
        return next ? next + (g + groups - quarter) * distance - w_.address(g) : 0;
    }

    // The line at `address` of a group's first row, and of the other rows.
    Prefetch in_quarters(const uint8_t* address, int64_t quarter) const {
        const auto* first = reinterpret_cast<const char*>(address);
        const int64_t distance = quarter * w_.step * row_bytes_;
        return {first,
                first,
                0,
                {distance, 2 * distance, 3 * distance},
                Dot<X>::kStep * row_bytes_ / depth_};
    }

    Prefetch nothing() const {
        const auto* cached = reinterpret_cast<const char*>(xs_);
        return {cached, cached};
    }

    const Act* const* xs_;
    const int count_, fused_;
    const RowsOf<X> w_;
    const int64_t rows_, depth_, row_bytes_;
    float* out_;
    const int64_t ld_;
};

// out[m * ld + j] = xs[m] . row j of `w` for m < count, j < rows; the rest as of dot_rows.
template <class X>
void dot_stored(const typename Dot<X>::Act* const* xs, int count, const RowsOf<X>& w, int64_t rows,
                const uint8_t* next, float* out, int64_t ld) {
    const int64_t depth = w.matrix.depth;
    if (!w.matrix.decoder.runs) {
        return dot_rows(xs, count, reinterpret_cast<const X*>(w.address(0)), w.step * depth, rows,
                        depth, reinterpret_cast<const X*>(next), out, ld);
    }
    const DecodedRows<X> decoded(xs, count, w, rows, out, ld);
    if (is_short<X>(depth)) decoded.multiply_short();
    else decoded.multiply(next);
}

}  // namespace moesd::MOESD_ISA
