// The rows of ragged attention on AMX tiles, in bf16. Keys are read as they lie, against panels of queries; the weights of
// sixteen rows are a tile, against pairs of slots of the values, in the order of columns that Values<bf16> has.
//
// Invariance: a row takes its slots in ascending order, thirty-two at a time counted from the first of a block, and those it
// may not see with a weight of zero, which adds nothing.
#pragma once

#include "amx_tiles.h"
#include "attention_rows.h"

namespace moesd::MOESD_ISA {

constexpr int64_t kKeys = 4 * kTile;  // keys of a product

// The keys of the next product, fetched while the tiles of this one compute.
class KeysAhead {
public:
    KeysAhead(const bf16* keys, int64_t stride, int64_t depth, int64_t loads)
        : at_(keys), stride_(stride), depth_(depth), rows_(loads > 0 ? (kKeys + loads - 1) / loads : 0) {}

    void fetch() {
        for (int64_t i = 0; i < rows_; ++i, at_ += stride_) {
            for (int64_t k = 0; k < depth_; k += kStepDepth) __builtin_prefetch(at_ + k);
        }
    }

private:
    const bf16* at_;
    const int64_t stride_, depth_, rows_;
};

class TileRows : public AttentionRows<bf16, 2 * kTile> {
    static constexpr int64_t kColumns = 64;           // of the values, at a time: four tiles
    static constexpr int64_t kPart = Values<bf16>::kWide;

public:
    explicit TileRows(const AttentionArgs& a) : AttentionRows(a), panel_size_(steps_of(a.head_dim) * kStepSize) {}

    void start(const bf16* q, int64_t head) {
        for (int m = 0; m < count(); m += kTile) {
            const bf16* rows[kTile];
            const int size = count() - m < kTile ? count() - m : kTile;
            for (int i = 0; i < size; ++i) rows[i] = query_row(q, m + i);
            pack_panel(rows, size, a_.head_dim, query_ + m / kTile * panel_size_);
        }
        start_softmax(head);
    }

    void add_block(const bf16* keys, const bf16* values, int64_t slots, bool ends) {
        score(keys, slots, ends);
        const int64_t read = (most_ + kStepDepth - 1) / kStepDepth * kStepDepth;
        for (int m = 0; m < count(); ++m) {
            const int64_t seen = seen_[m / heads];
            if (seen > 0) rescale(m, seen);
            std::memset(static_cast<void*>(weights_of(m) + seen), 0, (read - seen) * sizeof(bf16));
        }
        for (int64_t d = 0; d < a_.value_dim; d += kColumns) {
            const bool finite = pack_values(values, d, most_);
            if (finite) add_values(0, count(), d, most_);
            // A weight of zero would not hide a value that is not a number.
            for (int n = 0; n < queries && !finite; ++n) {
                pack_values(values, d, seen_[n]);
                add_values(n * heads, heads, d, seen_[n]);
            }
        }
    }

private:
    // Scores of slots that nobody sees are never looked at, so the last keys may be any that the cache has.
    void score(const bf16* keys, int64_t slots, bool ends) {
        const int panels = (count() + kTile - 1) / kTile;
        for (int64_t j = 0; j < most_; j += kKeys) {
            const bf16* block = keys + j * a_.k_slot;
            const int64_t needed = most_ - j <= kKeys / 2 ? kKeys / 2 : kKeys;
            const int64_t rows = slots - j < needed ? slots - j : needed;
            const bool more = !ends || j + kKeys < most_;
            KeysAhead ahead(block + kKeys * a_.k_slot, a_.k_slot, a_.head_dim, more ? tile_loads(panels, rows, a_.head_dim) : 0);
            panels_product(Block(block, a_.k_slot, rows).tiles, query_, panel_size_, panels, a_.head_dim, ahead,
                           [&](int64_t w, int64_t p, const float* sums) {
                               if (j + w * kTile < most_) store_scores(p * kTile, j + w * kTile, sums);
                           });
        }
    }

    void store_scores(int64_t m, int64_t slot, const float* sums) {
        Vec by_row[kTile];
        sums_by_token(sums, by_row);
        for (int64_t i = 0; i < kTile && m + i < count(); ++i) store(scores_ + (m + i) * kSlotBlock + slot, by_row[i]);
    }

    // Columns d .. d + kColumns of values [0, slots) as tiles of thirty-two slots; false if one that some query may not see
    // is not finite.
    bool pack_values(const bf16* values, int64_t d, int64_t slots) {
        const __m512i infinite = _mm512_set1_epi16(0x7f80);
        bool finite = true;
        for (int64_t c = d, part = 0; c < a_.value_dim && part < kColumns / kPart; c += kPart, ++part) {
            const int64_t columns = a_.value_dim - c;
            const __mmask32 inside = columns < kPart ? (uint32_t{1} << columns) - 1 : ~uint32_t{0};
            for (int64_t i = 0; i < slots || i % kStepDepth; i += 2) {
                const bf16* at = values + i * a_.v_slot + c;
                __builtin_prefetch(at + kValuesAhead * a_.v_slot), __builtin_prefetch(at + (kValuesAhead + 1) * a_.v_slot);
                const __m512i x = _mm512_maskz_loadu_epi16(i < slots ? inside : 0, at);
                const __m512i y = _mm512_maskz_loadu_epi16(i + 1 < slots ? inside : 0, at + a_.v_slot);
                if (i + 1 >= common_) {
                    const __m512i exponents = _mm512_and_si512(x, infinite), exponents2 = _mm512_and_si512(y, infinite);
                    finite = finite && !_mm512_cmpeq_epi16_mask(exponents, infinite) &&
                             !_mm512_cmpeq_epi16_mask(exponents2, infinite);
                }
                bf16* pair = values_ + (i / kStepDepth * (kColumns / kTile) + 2 * part) * kStepSize + i % kStepDepth * kTile;
                _mm512_store_si512(pair, _mm512_unpacklo_epi16(x, y));
                _mm512_store_si512(pair + kStepSize, _mm512_unpackhi_epi16(x, y));
            }
        }
        return finite;
    }

    // Adds the packed values of `slots` slots to columns d .. d + kColumns of rows m .. m + count.
    void add_values(int m, int count, int64_t d, int64_t slots) {
        for (int i = 0; i < count; i += kTile) {
            const int rows = count - i < kTile ? count - i : kTile;
            if (a_.value_dim - d > kPart) add_tiles<4>(m + i, rows, d, slots);
            else add_tiles<2>(m + i, rows, d, slots);
        }
    }

    template <int N>
    void add_tiles(int m, int rows, int64_t d, int64_t slots) {
        alignas(64) float sums[N * kTileSums];
        float* acc = acc_ + m * width_ + d;
        const int64_t row_bytes = width_ * sizeof(float);
        const bool shared = m + rows < count();  // others' rows follow in the tile
        for_tiles<N>([&]<int I>() { tile_load<I>(acc + I * kTile, row_bytes); });
        const bf16* tiles = values_;
        for (int64_t i = 0; i < slots; i += kStepDepth, tiles += kColumns / kTile * kStepSize) {
            tile_load<4>(weights_of(m) + i, kWeightStride * sizeof(bf16));
            for_tiles<N>([&]<int I>() {
                tile_load<5 + I % 2>(tiles + I * kStepSize, 64);
                tile_multiply<I, 4, 5 + I % 2>();
            });
        }
        if (!shared || rows == kTile) {
            for_tiles<N>([&]<int I>() { tile_store<I>(acc + I * kTile, row_bytes); });
            return;
        }
        for_tiles<N>([&]<int I>() { tile_store<I>(sums + I * kTile, N * kTile * sizeof(float)); });
        for (int i = 0; i < rows; ++i) std::memcpy(acc + i * width_, sums + i * N * kTile, N * kTile * sizeof(float));
    }

    const Tiles tiles_;
    const int64_t panel_size_;
    alignas(64) bf16 query_[2 * steps_of(kMaxHeadDim) * kStepSize];
    alignas(64) bf16 values_[kSlotBlock / kStepDepth * (kColumns / kTile) * kStepSize];
};

}  // namespace moesd::MOESD_ISA
