// Weight rows as tiles read them: plain ones where they lie, others decoded into a thread's buffer,
// once for all the panels that are multiplied by them.
#pragma once

#include "amx_tiles.h"
#include "../kernels/formats/dot_stored.h"

namespace moesd::MOESD_ISA {

// Up to kTile rows first, first + step, ... of a matrix. `buffer` holds kTile rows of
// align_depth(depth); it is not used for plain weights.
inline WeightRows tile_rows(const RowsOf<bf16>& w, int64_t rows, bf16* buffer) {
    const int64_t depth = w.matrix.depth, count = rows < 0 ? 0 : rows < kTile ? rows : kTile;
    if (!w.matrix.decoder.runs) {
        return {reinterpret_cast<const bf16*>(w.address(0)), w.step * depth, count};
    }
    const int64_t stride = align_depth(depth);
    for (int64_t i = 0; i < count; ++i) {
        w.matrix.decoder.runs(w.row(i), 0, depth, buffer + i * stride);
    }
    return {buffer, stride, count};
}

// Up to kDecodedRows weight rows, as tiles of sixteen.
struct Block {
    WeightRows tiles[4];

    Block(const Matrix<bf16>& matrix, int64_t first, int64_t rows, bf16* buffer) {
        const int64_t size = kTile * align_depth(matrix.depth);
        for (int64_t i = 0; i < 4; ++i) {
            tiles[i] =
                tile_rows({matrix, first + i * kTile, 1}, rows - i * kTile, buffer + i * size);
        }
    }
};

}  // namespace moesd::MOESD_ISA
