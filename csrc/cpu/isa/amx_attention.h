// The rows of ragged attention on AMX tiles, in bf16: up to sixteen of them are a tile, first of
// queries against transposed keys, then of weights against pairs of slots of the values, in the
// order of columns that Values<bf16> has. A tile of few rows takes little time, so a single token
// costs no more than it has to.
//
// Invariance: a row takes its slots in ascending order, thirty-two at a time counted from the first
// of a block, and those it may not see with a weight of zero, which adds nothing.
#pragma once

#include "amx_tiles.h"
#include "../kernels/attention_rows.h"
#include "../kernels/dot_pairs.h"

namespace moesd::MOESD_ISA {

class TileRows : public AttentionRows<bf16, 2 * kTile> {
public:
    using AttentionRows::AttentionRows;

    void start(const bf16* q, int64_t head) {
        start_rows(q, head);
        tile_rows(count());
    }

    void add_block(const bf16* keys, const bf16* values, bool ends) {
        for (int64_t j = 0; j < most_; j += 2 * kTile) score(keys + j * a_.k_slot, j, ends);
        const int64_t read = steps_of(most_) * kStepDepth;
        for (int m = 0; m < count(); ++m) {
            const int64_t seen = seen_[m / heads];
            if (seen > 0) rescale(m, seen);
            std::memset(static_cast<void*>(weights_of(m) + seen), 0, (read - seen) * sizeof(bf16));
        }
        for (int64_t d = 0; d < a_.value_dim; d += kColumns) {
            if (pack_values(values, d, most_)) add_values(0, d, most_);
            else add_by_query(values, d);
        }
    }

private:
    static constexpr int64_t kColumns = Values<bf16>::kWide;  // of the values, at a time: two tiles

    // Sums of the first sixteen rows in tiles 0 and 1, of the others in 2 and 3; the rows
    // themselves in 4 and 5.
    void tile_rows(int rows) {
        if (rows == tiled_) return;
        const uint8_t first = static_cast<uint8_t>(rows < kTile ? rows : kTile);
        const uint8_t second = static_cast<uint8_t>(rows > kTile ? rows - kTile : 1);
        tiles_.configure({first, first, second, second, first, second, kTile, kTile});
        tiled_ = rows;
    }

    // Scores of the thirty-two slots from j on; those of slots that nobody sees are never looked
    // at.
    void score(const bf16* keys, int64_t j, bool ends) {
        const int64_t left = most_ - j;
        const bf16* ahead = left <= 2 * kTile && ends ? nullptr : keys + 2 * kTile * a_.k_slot;
        transpose_pairs(keys, a_.k_slot, left, a_.head_dim, ahead, keys_[0]);
        // Behind the last key there may be no more to read: then what is there already is as good.
        if (left > kTile) {
            transpose_pairs(keys + kTile * a_.k_slot, a_.k_slot, left - kTile, a_.head_dim,
                            ahead ? ahead + kTile * a_.k_slot : nullptr, keys_[1]);
        }
        for_tiles<4>([]<int I>() { tile_zero<I>(); });
        for (int64_t step = 0; step < steps_of(a_.head_dim); ++step) {
            multiply(query_ + step * kStepDepth, depth_, keys_[0] + step * kTile,
                     keys_[1] + step * kTile);
        }
        store_sums(scores_ + j, kSlotBlock);
    }

    // Adds the products of a tile of columns of the rows at `rows` and two tiles, to all sums.
    void multiply(const bf16* rows, int64_t stride, const void* low, const void* high) const {
        tile_load<4>(rows, stride * sizeof(bf16));
        tile_load<6>(low, 64), tile_load<7>(high, 64);
        tile_multiply<0, 4, 6>(), tile_multiply<1, 4, 7>();
        if (tiled_ <= kTile) return;
        tile_load<5>(rows + kTile * stride, stride * sizeof(bf16));
        tile_multiply<2, 5, 6>(), tile_multiply<3, 5, 7>();
    }

    void load_sums(const float* at, int64_t stride) const {
        tile_load<0>(at, stride * sizeof(float)), tile_load<1>(at + kTile, stride * sizeof(float));
        if (tiled_ <= kTile) return;
        at += kTile * stride;
        tile_load<2>(at, stride * sizeof(float)), tile_load<3>(at + kTile, stride * sizeof(float));
    }

    void store_sums(float* at, int64_t stride) const {
        tile_store<0>(at, stride * sizeof(float));
        tile_store<1>(at + kTile, stride * sizeof(float));
        if (tiled_ <= kTile) return;
        at += kTile * stride;
        tile_store<2>(at, stride * sizeof(float));
        tile_store<3>(at + kTile, stride * sizeof(float));
    }

    // Columns d .. d + kColumns of values [0, slots) as pairs of slots, zeros up to thirty-two of
    // them; false if one that some query may not see is not finite.
    bool pack_values(const bf16* values, int64_t d, int64_t slots) {
        const int64_t columns = a_.value_dim - d, open = columns < kColumns ? 0
                                                         : slots < common_  ? slots
                                                                            : common_;
        const __mmask32 inside = columns < kColumns ? (uint32_t{1} << columns) - 1 : ~uint32_t{0};
        const bf16* at = values + d;
        int64_t i = 0;
        for (; i + 2 <= open; i += 2, at += 2 * a_.v_slot) {
            __builtin_prefetch(at + kValuesAhead * a_.v_slot);
            __builtin_prefetch(at + (kValuesAhead + 1) * a_.v_slot);
            pack_pair(_mm512_loadu_si512(at), _mm512_loadu_si512(at + a_.v_slot), i);
        }
        bool finite = true;
        for (; i < slots || i % kStepDepth; i += 2, at += 2 * a_.v_slot) {
            const __m512i x = _mm512_maskz_loadu_epi16(i < slots ? inside : 0, at);
            const __m512i y = _mm512_maskz_loadu_epi16(i + 1 < slots ? inside : 0, at + a_.v_slot);
            finite = finite && (i + 2 <= common_ || (is_finite(x) && is_finite(y)));
            pack_pair(x, y, i);
        }
        return finite;
    }

    void pack_pair(__m512i x, __m512i y, int64_t i) {
        values_[0][i / 2] = _mm512_unpacklo_epi16(x, y);
        values_[1][i / 2] = _mm512_unpackhi_epi16(x, y);
    }

    static bool is_finite(__m512i x) {
        const __m512i exponent = _mm512_set1_epi16(0x7f80);
        return !_mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
    }

    // Adds the packed values of `slots` slots to columns d .. d + kColumns of the rows from m on
    // that are tiled.
    void add_values(int m, int64_t d, int64_t slots) {
        load_sums(acc_ + m * width_ + d, width_);
        for (int64_t i = 0; i < slots; i += kStepDepth) {
            multiply(weights_of(m) + i, kWeightStride, values_[0] + i / 2, values_[1] + i / 2);
        }
        store_sums(acc_ + m * width_ + d, width_);
    }

    // A weight of zero would not hide a value that is not a number: every query gets what it sees
    // and nothing else.
    void add_by_query(const bf16* values, int64_t d) {
        const int rows = tiled_;
        tile_rows(heads);
        for (int n = 0; n < queries; ++n) {
            pack_values(values, d, seen_[n]);
            add_values(n * heads, d, seen_[n]);
        }
        tile_rows(rows);
    }

    Tiles tiles_;
    int tiled_ = 0;  // rows that the tiles are configured for
    __m512i keys_[2][steps_of(kMaxHeadDim) * kTile] = {};
    __m512i values_[2][kSlotBlock / 2];
};

}  // namespace moesd::MOESD_ISA
