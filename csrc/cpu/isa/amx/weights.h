// Weight rows as tiles read them: plain ones where they lie; others decoded into a thread's buffer,
// for many panels all of them once, for few a chunk of the depth at a time, while the tiles
// multiply the chunk before it.
#pragma once

#include "int16.h"
#include "../../kernels/formats/dot_stored.h"

namespace moesd::MOESD_ISA {

constexpr int64_t kChunkSteps = kDecodedChunk / kStepDepth;
constexpr int64_t kChunkStride = align_depth(kDecodedChunk);
constexpr int64_t kDecodedTile = kTile * kChunkStride;

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
                count};
    }

    // Decodes elements [k, k + length) of rows [row, row + n), and puts zeros after them up to a
    // step of the tiles: a row may end within a run.
    void decode(int64_t row, int64_t n, int64_t k, int64_t length, bf16* out,
                int64_t stride = kChunkStride) const {
        if (count == 0) return;
        out += row * stride;
        rows.matrix.decoder.runs(stored + row, n, k, length, out, stride);
        const int64_t over = steps_of(length) * kStepDepth - length;
        for (int64_t i = 0; i < n && over > 0; ++i) {
            std::memset(static_cast<void*>(out + i * stride + length), 0, over * sizeof(bf16));
        }
    }
};

// A stretch of the depth, in steps of the tiles.
struct Chunk {
    int64_t first, count;
};

// tile_product of weights that are decoded as they are multiplied: a chunk of one tile's rows at a
// time, while the chunk before it is multiplied. `buffer`: 2 * kDecodedTile.
template <int W, int T>
__attribute__((noinline)) void decoded_product(const TileOfRows* weights,
                                               const bf16* const (&panels)[T], int64_t depth,
                                               PrefetchStreams& prefetch, bf16* buffer,
                                               float* sums) {
    static_assert(W * T <= 4 && T <= 2);
    constexpr int64_t kParts = 8;  // in which a chunk's rows are decoded, and its steps multiplied
    const bf16* ready = buffer + kDecodedTile;
    const auto multiply = [&]<int I>(const Chunk& chunk, int64_t part) {
        for (int64_t i = chunk.count * part / kParts; i < chunk.count * (part + 1) / kParts; ++i) {
            prefetch.fetch();
            tile_load<4>(ready + i * kStepDepth, kChunkStride * sizeof(bf16));
            for_tiles<T>([&]<int P>() {
                tile_load<6 + P>(panels[P] + (chunk.first + i) * kStepSize, 64);
                tile_multiply<I * T + P, 4, 6 + P>();
            });
        }
    };
    for_tiles<W * T>([]<int I>() { tile_zero<I>(); });
    const int64_t steps = steps_of(depth), chunks = (steps + kChunkSteps - 1) / kChunkSteps;
    Chunk before{0, 0};
    bf16* filled = buffer;
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t first = steps * c / chunks, end = steps * (c + 1) / chunks;
        const Chunk chunk{first, end - first};
        const int64_t k = first * kStepDepth;
        const int64_t length = end == steps ? depth - k : chunk.count * kStepDepth;
        for_tiles<W>([&]<int I>() {
            for (int64_t part = 0; part < kParts; ++part) {
                multiply.template operator()<(I + W - 1) % W>(before, part);
                weights[I].decode(part * kTile / kParts, kTile / kParts, k, length, filled);
            }
            before = chunk;
            ready = filled, filled = filled == buffer ? buffer + kDecodedTile : buffer;
        });
    }
    for (int64_t part = 0; part < kParts; ++part) {
        multiply.template operator()<W - 1>(before, part);
    }
    for_tiles<W * T>([&]<int I>() { tile_store<I>(sums + I * kTileSums, 64); });
}

// Up to four tiles of weight rows, to be multiplied by `panels` panels. `buffer`: the thread's.
template <int N>
class Block {
    static constexpr int64_t kFewPanels = 2;  // that are multiplied at once

public:
    // `tile`: the i-th TileOfRows.
    template <class F>
    Block(const F& tile, int64_t panels, bf16* buffer)
        : Block(tile, panels, buffer, std::make_integer_sequence<int, N>()) {}

    int64_t rows(int i) const { return tiles_[i].count; }

    // Tile w * T + t of `sums` = tile First + w times panels[t].
    template <int First, int W, int T>
    void multiply(const bf16* const (&panels)[T], PrefetchStreams& prefetch, float* sums) const {
        static_assert(First + W <= N);
        if (int16_) return multiply_int16<First, W, T>(panels, prefetch, sums);
        if (!decodes_) {
            WeightRows part[W];
            for (int i = 0; i < W; ++i) part[i] = lying_[First + i];
            return tile_product<W, T>(part, panels, depth_, prefetch, sums);
        }
        decoded_product<W, T>(tiles_ + First, panels, depth_, prefetch, buffer_, sums);
    }

private:
    template <class F, int... I>
    Block(const F& tile, int64_t panels, bf16* buffer, std::integer_sequence<int, I...>)
        : tiles_{tile(I)...},
          depth_(tiles_[0].rows.matrix.depth),
          buffer_(buffer),
          int16_(takes_int16(tiles_[0].rows.matrix.stored, depth_)),
          decodes_(false) {
        if (int16_) return;
        const bool stored = tiles_[0].rows.matrix.decoder.runs;
        decodes_ = stored && panels <= kFewPanels;
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

    WeightRows decoded(int i) const {
        const int64_t stride = align_depth(depth_);
        bf16* const out = buffer_ + i * kTile * stride;
        tiles_[i].decode(0, tiles_[i].count, 0, depth_, out, stride);
        return {out, stride, tiles_[i].count};
    }

    const TileOfRows tiles_[N];
    const int64_t depth_;
    bf16* const buffer_;
    const bool int16_;
    bool decodes_;
    WeightRows lying_[N];
};

// Multiplies weight rows [first, first + rows), 4 * kTile at most, by `count` panels, each
// `panel_size` after the one before it, and calls finish(w, p, sums, more_sums) with the tiles of
// sums of panel p with the tiles w and w + 1 of the rows. `buffer`: the thread's.
template <class F>
void panels_product(const Matrix<bf16>& w, int64_t first, int64_t rows, const bf16* panels,
                    int64_t panel_size, int64_t count, PrefetchStreams& prefetch, bf16* buffer,
                    const F& finish) {
    const auto tile_of_rows = [&](int i) -> TileOfRows {
        return {{w, first + i * kTile, 1}, rows - i * kTile};
    };
    const Block<4> block(tile_of_rows, count, buffer);
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
