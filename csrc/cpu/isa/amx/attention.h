// The rows of ragged attention on AMX tiles, in bf16. Up to sixteen rows are a tile, which is
// multiplied twice: queries by transposed keys, then weights by values, of which two positions are
// interleaved (in the order of columns that Values<bf16> has). A tile of few rows takes little
// time, so a single token costs no more than it has to.
//
// Invariance: a row adds its positions in ascending order, thirty-two at a time from the first of a
// block on. A position that it must not see has a weight of zero, which adds nothing.
#pragma once

#include "tiles.h"
#include "../../kernels/attention_rows.h"
#include "../../kernels/dot_pairs.h"

namespace moesd::MOESD_ISA {

class TileRows : public AttentionRows<bf16, 2 * kTile> {
public:
    using AttentionRows::AttentionRows;

    void start(const bf16* q, int64_t head) {
        start_rows(q, head);
        tile_rows(count());
    }

    void add_block(const bf16* keys, const bf16* values, bool last_block) {
        for (int64_t j = 0; j < visible_to_any_; j += 2 * kTile) {
            score(keys + j * a_.k_position, j, last_block);
            fetch_values(values, j);
        }
        const int64_t padded = steps_of(visible_to_any_) * kStepDepth;
        for (int m = 0; m < count(); ++m) {
            const int64_t visible = visible_[m / heads];
            if (visible > 0) weigh(m, visible);
            std::memset(static_cast<void*>(weights_of(m) + visible), 0,
                        (padded - visible) * sizeof(bf16));
        }
        for (int64_t d = 0; d < a_.value_dim; d += kColumns) {
            if (pack_values(values, d, visible_to_any_)) add_values(0, d, visible_to_any_);
            else add_by_query(values, d);
        }
    }

private:
    static constexpr int64_t kColumns = Values<bf16>::kWide;  // of the values, at a time: two tiles

    // Configures the tiles: 0 and 1 hold the sums of the first sixteen rows, 2 and 3 those of the
    // others; 4 and 5 hold the rows, 6 and 7 what they are multiplied by.
    void tile_rows(int rows) {
        if (rows == tiled_) return;
        const uint8_t first = static_cast<uint8_t>(rows < kTile ? rows : kTile);
        const uint8_t second = static_cast<uint8_t>(rows > kTile ? rows - kTile : 1);
        tiles_.configure({first, first, second, second, first, second, kTile, kTile});
        tiled_ = rows;
    }

    // Prefetches the values of positions j .. j + 32, whose turn comes after all of the block's
    // scores.
    void fetch_values(const bf16* values, int64_t j) const {
        const int64_t end = j + 2 * kTile < visible_to_any_ ? j + 2 * kTile : visible_to_any_;
        for (; j < end; ++j) {
            for (int64_t d = 0; d < a_.value_dim; d += 32) {
                __builtin_prefetch(values + j * a_.v_position + d);
            }
        }
    }

    // Scores of the block's positions j .. j + 32. Those that no query sees are never read.
    void score(const bf16* keys, int64_t j, bool last_block) {
        const int64_t left = visible_to_any_ - j;
        const bf16* next =
            left <= 2 * kTile && last_block ? nullptr : keys + 2 * kTile * a_.k_position;
        constexpr int kFirstLevel = 3;
        transpose_pairs<kFirstLevel>(keys, a_.k_position, left, a_.head_dim, next, keys_[0]);
        // With sixteen positions or fewer the second tile keeps what it held: its scores are not
        // read.
        if (left > kTile) {
            transpose_pairs<kFirstLevel>(keys + kTile * a_.k_position, a_.k_position, left - kTile,
                                         a_.head_dim, next ? next + kTile * a_.k_position : nullptr,
                                         keys_[1]);
        }
        for_tiles<4>([]<int I>() { tile_zero<I>(); });
        for (int64_t step = 0; step < steps_of(a_.head_dim); ++step) {
            multiply(query_ + step * kStepDepth, depth_, keys_[0] + step * kTile,
                     keys_[1] + step * kTile);
        }
        store_sums(scores_ + j, kBlockPositions);
    }

    // All sums += the rows times the tiles `low` and `high`, over one step of the depth. `rows` is
    // the first row at that step.
    void multiply(const bf16* rows, int64_t stride, const void* low, const void* high) const {
        tile_load<4>(rows, stride * sizeof(bf16));
        tile_load<6>(low, 64), tile_load<7>(high, 64);
        tile_multiply<0, 4, 6>(), tile_multiply<1, 4, 7>();
        if (tiled_ <= kTile) return;
        tile_load<5>(rows + kTile * stride, stride * sizeof(bf16));
        tile_multiply<2, 5, 6>(), tile_multiply<3, 5, 7>();
    }

    void load_sums(const float* sums, int64_t stride) const {
        tile_load<0>(sums, stride * sizeof(float));
        tile_load<1>(sums + kTile, stride * sizeof(float));
        if (tiled_ <= kTile) return;
        sums += kTile * stride;
        tile_load<2>(sums, stride * sizeof(float));
        tile_load<3>(sums + kTile, stride * sizeof(float));
    }

    void store_sums(float* sums, int64_t stride) const {
        tile_store<0>(sums, stride * sizeof(float));
        tile_store<1>(sums + kTile, stride * sizeof(float));
        if (tiled_ <= kTile) return;
        sums += kTile * stride;
        tile_store<2>(sums, stride * sizeof(float));
        tile_store<3>(sums + kTile, stride * sizeof(float));
    }

    // Packs columns d .. d + kColumns of the block's first `num_positions` values, two positions
    // interleaved, with zeros up to a multiple of thirty-two positions. Returns false if a value
    // that some query must not see is not finite.
    bool pack_values(const bf16* values, int64_t d, int64_t num_positions) {
        const int64_t columns = a_.value_dim - d;
        const int64_t shared = num_positions < visible_to_all_ ? num_positions : visible_to_all_;
        const int64_t unmasked = columns < kColumns ? 0 : shared;
        const __mmask32 valid = columns < kColumns ? (uint32_t{1} << columns) - 1 : ~uint32_t{0};
        const bf16* value = values + d;
        int64_t i = 0;
        for (; i + 2 <= unmasked; i += 2, value += 2 * a_.v_position) {
            __builtin_prefetch(value + kPrefetchDistance * a_.v_position);
            __builtin_prefetch(value + (kPrefetchDistance + 1) * a_.v_position);
            pack_pair(_mm512_loadu_si512(value), _mm512_loadu_si512(value + a_.v_position), i);
        }
        bool finite = true;
        for (; i < num_positions || i % kStepDepth; i += 2, value += 2 * a_.v_position) {
            const __m512i x = _mm512_maskz_loadu_epi16(i < num_positions ? valid : 0, value);
            const __m512i y =
                _mm512_maskz_loadu_epi16(i + 1 < num_positions ? valid : 0, value + a_.v_position);
            finite = finite && (i + 2 <= visible_to_all_ || (is_finite(x) && is_finite(y)));
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

    // Adds the packed values of `num_positions` positions to columns d .. d + kColumns of tiled_
    // rows, the first of them m.
    void add_values(int m, int64_t d, int64_t num_positions) {
        load_sums(acc_ + m * width_ + d, width_);
        for (int64_t i = 0; i < num_positions; i += kStepDepth) {
            multiply(weights_of(m) + i, kWeightStride, values_[0] + i / 2, values_[1] + i / 2);
        }
        store_sums(acc_ + m * width_ + d, width_);
    }

    // For values of which a hidden one is not finite, and would make zero times itself NaN: each
    // query's values are packed without those that are hidden from it.
    void add_by_query(const bf16* values, int64_t d) {
        const int rows = tiled_;
        tile_rows(heads);
        for (int n = 0; n < queries; ++n) {
            pack_values(values, d, visible_[n]);
            add_values(n * heads, d, visible_[n]);
        }
        tile_rows(rows);
    }

    Tiles tiles_;
    int tiled_ = 0;  // rows that the tiles are configured for
    __m512i keys_[2][steps_of(kMaxHeadDim) * kTile] = {};
    __m512i values_[2][kBlockPositions / 2];
};

}  // namespace moesd::MOESD_ISA
