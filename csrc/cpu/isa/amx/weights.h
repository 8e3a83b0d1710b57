// Weight rows as tiles read them: plain ones where they lie; others decoded into a thread's buffer,
// tile by tile, for many panels all of them once, for few a chunk of the depth at a time, while the
// chunk before it is multiplied.
#pragma once

#include "decoders.h"
#include "int16.h"
#include "lanes.h"
#include "../../kernels/formats/dot_stored.h"

namespace moesd::MOESD_ISA {

constexpr int64_t kChunkSteps = kDecodedChunk / kStepDepth;
constexpr int64_t kChunkSize = kChunkSteps * kStepSize;

// Prefetches `count` rows of a matrix from row `first` on and as many from row `second` on, with
// the scales that they have to themselves.
inline PrefetchStreams prefetch_rows(const Matrix<bf16>& w, int64_t first, int64_t second,
                                     int64_t count, int64_t loads) {
    const int64_t scales = w.stored.rows_per_scale == 1 ? count * w.stored.scale_row_bytes : 0;
    return {{w.row(first), w.row(second), count * w.stored.row_bytes},
            {w.stored_row(first).scales, w.stored_row(second).scales, scales},
            loads};
}

// Rows of a matrix that make up a tile, of which `count` exist.
struct TileOfRows {
    RowsOf<bf16> rows;
    int64_t count;
    // Missing ones are copies of the last, whose sums nobody reads.
    StoredRow stored[kTile];

    TileOfRows(const RowsOf<bf16>& from, int64_t left)
        : rows(from),
          count(left < 0       ? 0
                : left < kTile ? left
                               : kTile) {
        if (!rows.matrix.decoder.runs) return;
        for (int64_t i = 0; i < kTile; ++i) stored[i] = rows.row(i < count ? i : count - 1);
    }

    WeightRows as_they_lie() const {
        return {reinterpret_cast<const bf16*>(rows.address(0)), rows.step * rows.matrix.depth,
                kStepDepth, count};
    }

    // Decodes `steps` steps of the depth from step `first` on, a tile of each after another.
    void decode(int64_t first, int64_t steps, bf16* out, const AfterRun& after) const {
        tile_decoder_of(rows.matrix.stored.format)(stored, first * kStepDepth, steps,
                                                   reinterpret_cast<DecodedRun*>(out), after);
    }
};

// Decoded steps of one tile's rows.
struct Chunk {
    const bf16* weights;
    int64_t first, count;
};

// tile_product of weights that are decoded as they are multiplied: a chunk of one tile's rows at a
// time, and after each of its steps a step of the chunk before it is multiplied. `buffer`: two
// chunks.
template <int W, int T>
__attribute__((noinline)) void decoded_product(const TileOfRows* weights,
                                               const bf16* const (&panels)[T], int64_t depth,
                                               PrefetchStreams& prefetch, bf16* buffer,
                                               float* sums) {
    static_assert(W * T <= 4 && T <= 2);
    Chunk ready{nullptr, 0, 0};
    const auto multiply = [&]<int I>(int64_t step) {
        prefetch.fetch();
        tile_load<4>(ready.weights + step * kStepSize, kStepDepth * sizeof(bf16));
        for_tiles<T>([&]<int P>() {
            tile_load<6 + P>(panels[P] + (ready.first + step) * kStepSize, 64);
            tile_multiply<I * T + P, 4, 6 + P>();
        });
    };
    for_tiles<W * T>([]<int I>() { tile_zero<I>(); });
    const int64_t steps = steps_of(depth);
    bf16* out = buffer;
    for (int64_t first = 0; first < steps; first += kChunkSteps) {
        const int64_t count = steps - first < kChunkSteps ? steps - first : kChunkSteps;
        for_tiles<W>([&]<int I>() {
            const auto multiply_before = [&](int64_t step) {
                if (step < ready.count) multiply.template operator()<(I + W - 1) % W>(step);
            };
            // A tile of no rows has sums that nobody reads.
            const int64_t decoded = weights[I].count > 0 ? count : 0;
            if (decoded > 0) weights[I].decode(first, count, out, AfterRun(multiply_before));
            for (int64_t step = decoded; step < ready.count; ++step) multiply_before(step);
            ready = {out, first, decoded};
            out = out == buffer ? buffer + kChunkSize : buffer;
        });
    }
    for (int64_t step = 0; step < ready.count; ++step) multiply.template operator()<W - 1>(step);
    for_tiles<W * T>([&]<int I>() { tile_store<I>(sums + I * kTileSums, 64); });
}

// Elements of a panel before its pairs, which hold its numbers as products without tiles of bf16
// take them.
inline int64_t panel_extra(const StoredWeights& w, int64_t depth) {
    const int64_t bytes = takes_int16(w, depth)   ? Int16Panel::bytes_of(depth)
                          : takes_lanes(w, depth) ? LanePanel::bytes_of(depth)
                                                  : 0;
    return bytes / static_cast<int64_t>(sizeof(bf16));
}

// Takes them out of the pairs of `tokens` tokens.
inline void fill_extra(const StoredWeights& w, bf16* panel, int64_t depth, int64_t tokens) {
    const bf16* const pairs = panel + panel_extra(w, depth);
    if (takes_int16(w, depth)) take_integers(pairs, depth, Int16Panel(panel));
    if (takes_lanes(w, depth) && tokens <= kLaneTokens) {
        take_floats(pairs, depth, tokens, LanePanel(panel, depth));
    }
}

// Up to four tiles of weight rows, to be multiplied by `tokens` tokens. `buffer`: the thread's.
template <int N>
class Block {
    static constexpr int64_t kFewPanels = 2;  // that are multiplied at once

public:
    // `tile`: the i-th TileOfRows.
    template <class F>
    Block(const F& tile, int64_t tokens, bf16* buffer)
        : Block(tile, tokens, buffer, std::make_integer_sequence<int, N>()) {}

    int64_t rows(int i) const { return tiles_[i].count; }

    // Tile w * T + t of `sums` = tile First + w times panels[t].
    template <int First, int W, int T>
    void multiply(const bf16* const (&panels)[T], PrefetchStreams& prefetch, float* sums) const {
        static_assert(First + W <= N);
        if (int16_) return multiply_int16<First, W, T>(panels, prefetch, sums);
        const bf16* pairs[T];
        for (int t = 0; t < T; ++t) pairs[t] = panels[t] + extra_;
        if constexpr (T == 1) {
            if (lane_tokens_ > 0 && multiply_lanes<First, W>(panels[0], prefetch, sums)) return;
        }
        if (!decodes_) {
            WeightRows part[W];
            for (int i = 0; i < W; ++i) part[i] = lying_[First + i];
            return tile_product<W, T>(part, pairs, depth_, prefetch, sums);
        }
        decoded_product<W, T>(tiles_ + First, pairs, depth_, prefetch, buffer_, sums);
    }

private:
    template <class F, int... I>
    Block(const F& tile, int64_t tokens, bf16* buffer, std::integer_sequence<int, I...>)
        : tiles_{tile(I)...},
          depth_(tiles_[0].rows.matrix.depth),
          buffer_(buffer),
          extra_(panel_extra(tiles_[0].rows.matrix.stored, depth_)),
          int16_(takes_int16(tiles_[0].rows.matrix.stored, depth_)),
          lane_tokens_(takes_lanes(tiles_[0].rows.matrix.stored, depth_) && tokens <= kLaneTokens
                           ? static_cast<int>(tokens)
                           : 0),
          decodes_(false) {
        if (int16_) return;
        const bool stored = tiles_[0].rows.matrix.decoder.runs;
        decodes_ = stored && tokens <= kFewPanels * kTile;
        if (!decodes_) ((lying_[I] = stored ? decoded(I) : tiles_[I].as_they_lie()), ...);
    }

    template <int First, int W, int T>
    void multiply_int16(const bf16* const (&panels)[T], PrefetchStreams& prefetch,
                        float* sums) const {
        constexpr int kTogether = T == 1 && W > 1 ? 2 : 1;
        for_tiles<W / kTogether>([&]<int I>() {
            constexpr int kFrom = First + I * kTogether;
            if (tiles_[kFrom].count == 0) return;
            const StoredRow* rows[kTogether];
            bool whole = true;
            for (int i = 0; i < kTogether; ++i) {
                const TileOfRows& tile = tiles_[kFrom + i];
                rows[i] = tile.count == 0 ? tiles_[kFrom].stored : tile.stored;
                whole = whole && tile.count == kTile;
            }
            int16_product<kTogether, T>(rows, whole, panels, depth_, prefetch,
                                        sums + I * kTogether * T * kTileSums);
        });
    }

    // Whether the sums are those of tiles.
    template <int First, int W>
    bool multiply_lanes(const bf16* memory, PrefetchStreams& prefetch, float* sums) const {
        const LanePanel panel(memory, depth_);
        bool same = *panel.in_range;
        for (int i = 0; i < W && same; ++i) {
            if (tiles_[First + i].count == 0) continue;
            for_size<kLaneTokens>(lane_tokens_, [&]<int T>() {
                same = lanes_product<T>(tiles_[First + i].stored, panel, depth_, prefetch,
                                        sums + i * kTileSums);
            });
        }
        return same;
    }

    WeightRows decoded(int i) const {
        bf16* const out = buffer_ + i * steps_of(depth_) * kStepSize;
        const auto nothing = [](int64_t) {};
        if (tiles_[i].count > 0) tiles_[i].decode(0, steps_of(depth_), out, AfterRun(nothing));
        return {out, kStepDepth, kStepSize, tiles_[i].count};
    }

    const TileOfRows tiles_[N];
    const int64_t depth_;
    bf16* const buffer_;
    const int64_t extra_;
    const bool int16_;
    const int lane_tokens_;  // 0: tiles take them
    bool decodes_;
    WeightRows lying_[N];
};

// Multiplies weight rows [first, first + rows), 4 * kTile at most, by the panels of `tokens`
// tokens, each `panel_size` after the one before it, and calls finish(w, p, sums, more_sums) with
// the tiles of sums of panel p with the tiles w and w + 1 of the rows. `buffer`: the thread's.
template <class F>
void panels_product(const Matrix<bf16>& w, int64_t first, int64_t rows, const bf16* panels,
                    int64_t panel_size, int64_t tokens, PrefetchStreams& prefetch, bf16* buffer,
                    const F& finish) {
    const int64_t count = (tokens + kTile - 1) / kTile;
    const auto tile_of_rows = [&](int i) -> TileOfRows {
        return {{w, first + i * kTile, 1}, rows - i * kTile};
    };
    const Block<4> block(tile_of_rows, tokens, buffer);
    alignas(64) float sums[4 * kTileSums];
    const auto tile = [&](int i) { return sums + i * kTileSums; };
    int64_t p = 0;
    for (; p + 2 <= count; p += 2) {
        const bf16* const pair[2] = {panels + p * panel_size, panels + (p + 1) * panel_size};
        for_tiles<2>([&]<int Half>() {
            if (block.rows(2 * Half) == 0) return;
            block.multiply<2 * Half, 2>(pair, prefetch, sums);
            for (int t = 0; t < 2; ++t) finish(2 * Half, p + t, tile(t), tile(2 + t));
        });
    }
    if (p == count) return;
    const bf16* const last[1] = {panels + p * panel_size};
    if (block.rows(2) > 0) {
        block.multiply<0, 4>(last, prefetch, sums);
        for (int half = 0; half < 4; half += 2) finish(half, p, tile(half), tile(half + 1));
    } else {
        block.multiply<0, 2>(last, prefetch, sums);
        finish(0, p, tile(0), tile(1));
    }
}

}  // namespace moesd::MOESD_ISA
