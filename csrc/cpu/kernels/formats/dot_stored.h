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
    Decode<X>* decode;  // null: plain

    Matrix(const StoredWeights& weights, int64_t row_depth)
        : stored(weights), depth(row_depth), decode(decoder_of<X>(weights.format)) {}

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

    // Decodes elements [k, k + n) of row r to `out`, and those of whole runs around them.
    void decode_row(int64_t r, int64_t k, int64_t n, X* out) const {
        const int64_t before = k % kRun;
        const uint8_t* row_scales = scales() + r / stored.rows_per_scale * stored.scale_row_bytes;
        decode({row(r), row_scales, stored.group}, k - before, n + before, out - before);
    }
};

// Weight rows first, first + step, ... of a matrix.
template <class X>
struct RowsOf {
    const Matrix<X>& matrix;
    int64_t first, step;

    const uint8_t* address(int64_t i) const { return matrix.row(first + i * step); }
    RowsOf from(int64_t i) const { return {matrix, first + i * step, step}; }
};

// dot_decoded for one call's arguments.
template <class X>
class DecodedRows {
    using Act = typename Dot<X>::Act;
    static constexpr int64_t kStep = Dot<X>::kStep;
    // Elements of the longest block of the depth, and from row to row of a buffer.
    static constexpr int64_t kMaxBlock = kWholeBytes / sizeof(Act);
    static constexpr int64_t kStride = align_depth(kMaxBlock + 2 * kRun);
    static constexpr int64_t kMost = 32;  // weight rows that are decoded for several tiles

public:
    DecodedRows(const Act* const* xs, int count, const RowsOf<X>& w, int64_t depth, float* out,
                int64_t ld)
        : xs_(xs), count_(count), tiles_(tiles_of(count)), w_(w), depth_(depth), out_(out), ld_(ld) {}

    // One tile waits for memory: it decodes a group at a time, which stays in the first-level cache.
    void by_group(int64_t rows, const uint8_t* next) const {
        alignas(64) X buffer[4 * kStride];
        const int64_t quarter = (rows + 3) / 4;
        const int64_t ahead = groups_ahead();
        for (int64_t g = 0; g < quarter; ++g) {
            const GroupedRows<X> group{xs_, count_, 1, kStride, 4, depth_, out_ + 4 * g, ld_};
            const uint8_t* later = g + ahead < quarter ? w_.address(g + ahead)
                                   : next ? next + (g + ahead - quarter) * row_distance()
                                          : nullptr;
            for (int64_t k0 = 0; k0 == 0 || k0 < group.whole; k0 += group.block) {
                const int64_t length = length_at(group, k0);
                X* decoded = buffer + k0 % kRun;
                for (int64_t n = 0; n < 4; ++n) {
                    const int64_t row = g + n * quarter < rows ? g + n * quarter : rows - 1;
                    decode(row, k0, length, decoded + n * kStride);
                }
                const Prefetch prefetch = prefetch_from(later, k0, quarter);
                group.visit(decoded, k0, 0, 0, 1, [&](int) { return prefetch; });
            }
        }
        for (int m = 0; m < count_; ++m) sort_quarters(out_ + m * ld_, quarter);
    }

    // Several tiles share what is decoded, which stays in the second-level cache.
    void by_block(int64_t rows, const uint8_t* next) const {
        alignas(64) X buffer[kMost * kStride];
        for (int64_t j = 0; j < rows; j += kMost) {
            const int64_t part = rows - j < kMost ? rows - j : kMost;
            const uint8_t* next_part = j + kMost < rows ? w_.address(j + kMost) : next;
            if (is_short<X>(depth_)) {
                for (int64_t i = 0; i < part; ++i) decode(j + i, 0, depth_, buffer + i * kStride);
                dot_rows<X>(xs_, count_, buffer, kStride, part, depth_, nullptr, out_ + j, ld_);
            } else {
                multiply_part(j, part, next_part, buffer);
            }
        }
    }

private:
    void decode(int64_t row, int64_t k0, int64_t length, X* out) const {
        w_.matrix.decode_row(w_.first + row * w_.step, k0, length, out);
    }

    // Elements of the block at k0, those after the last whole step included.
    int64_t length_at(const GroupedRows<X>& rows, int64_t k0) const {
        return k0 + rows.block >= rows.whole ? depth_ - k0 : rows.block;
    }

    int64_t row_distance() const { return w_.step * w_.matrix.stored.row_bytes; }

    // How many groups before its use a group is prefetched.
    int64_t groups_ahead() const {
        const int64_t bytes = w_.matrix.stored.row_bytes;
        return bytes > 0 ? (kFarBytes + bytes - 1) / bytes : 1;
    }

    // A tile of a whole block prefetches the rows `later` and those one to three quarters after it,
    // from element k0 of the depth on.
    Prefetch prefetch_from(const uint8_t* later, int64_t k0, int64_t quarter) const {
        const int64_t row_bytes = w_.matrix.stored.row_bytes, distance = quarter * row_distance();
        const auto* address = reinterpret_cast<const char*>(later ? later : w_.address(0)) +
                              k0 * row_bytes / depth_;
        return {address, address, 0, {distance, 2 * distance, 3 * distance},
                later ? kStep * row_bytes / depth_ : 0};
    }

    void multiply_part(int64_t j, int64_t rows, const uint8_t* next, X* buffer) const {
        const GroupedRows<X> groups{xs_, count_, tiles_, kStride, rows, depth_, out_ + j, ld_};
        for (int64_t k0 = 0; k0 == 0 || k0 < groups.whole; k0 += groups.block) {
            X* decoded = buffer + k0 % kRun;
            for (int64_t i = 0; i < rows; ++i) {
                decode(j + i, k0, length_at(groups, k0), decoded + i * kStride);
            }
            const bool last_block = k0 + groups.block >= groups.whole;
            const uint8_t* later = last_block ? next : w_.address(j);
            for (int pair = 0; pair < tiles_; pair += 2) {
                for (int64_t g = 0; g < groups.quarter; ++g) {
                    const uint8_t* row = pair == 0 && later ? later + g * row_distance() : nullptr;
                    const Prefetch prefetch = prefetch_from(
                        row, last_block ? 0 : k0 + groups.block, groups.quarter);
                    const Prefetch none = prefetch_from(nullptr, 0, 0);
                    groups.visit(decoded, k0, g, pair, pair + 2 < tiles_ ? pair + 2 : tiles_,
                                 [&](int t) { return t == 0 ? prefetch : none; });
                }
            }
        }
        for (int m = 0; m < count_; ++m) sort_quarters(out_ + j + m * ld_, groups.quarter);
    }

    const Act* const* xs_;
    const int count_, tiles_;
    const RowsOf<X> w_;
    const int64_t depth_;
    float* out_;
    const int64_t ld_;
};

// out[m * ld + j] = xs[m] . row j of `w` for m < count, j < rows; the rest as of dot_rows.
template <class X>
void dot_stored(const typename Dot<X>::Act* const* xs, int count, const RowsOf<X>& w, int64_t rows,
                const uint8_t* next, float* out, int64_t ld) {
    const int64_t depth = w.matrix.depth;
    if (!w.matrix.decode) {
        return dot_rows(xs, count, reinterpret_cast<const X*>(w.address(0)), w.step * depth, rows,
                        depth, reinterpret_cast<const X*>(next), out, ld);
    }
    const DecodedRows<X> decoded(xs, count, w, depth, out, ld);
    if (tiles_of(count) == 1 && !is_short<X>(depth)) {
        decoded.by_group(rows, next);
    } else {
        decoded.by_block(rows, next);
    }
}

}  // namespace moesd::MOESD_ISA
