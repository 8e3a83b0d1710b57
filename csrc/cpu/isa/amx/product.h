// VnniProduct with the integers on AMX tiles where there are more than a few rows of activations:
// these are the first operand, and a tile of sums has a row for each. A tile is of one run, since
// each has scales of its own. The sums have the same bits.
#pragma once

#include "tiles.h"
#include "../../kernels/int8/vnni/product.h"

namespace moesd::MOESD_ISA {

class AmxProduct : public VnniProduct {
    static constexpr int kTiles = 4;  // of sums, of as many runs

public:
    static constexpr int kFusedRows = 4;  // which take longer on tiles

    struct Thread {
        const Tiles tiles;
        explicit Thread(int64_t rows)
            : tiles(rows < kPanelRows ? static_cast<int>(rows) : kPanelRows, kRun) {}
    };

    // A tile's product is of a whole run, with one scale.
    template <Scaling S>
    static void add(const CodeTile& tile, const Panel& x, int rows, float* sums,
                    WeightsAhead& ahead) {
        if constexpr (S != Scaling::kHalves) {
            if (rows > kFusedRows) {
                // In steps of four: rows that are missing have sums nobody reads.
                return for_size<kPanelRows / 4>((rows + 3) / 4, [&]<int Fours>() {
                    add_rows<S, 4 * Fours>(tile, x, sums, ahead);
                });
            }
        }
        VnniProduct::add<S>(tile, x, rows, sums, ahead);
    }

private:
    template <Scaling S, int M>
    __attribute__((noinline)) static void add_rows(const CodeTile& tile, const Panel& x,
                                                   float* sums, WeightsAhead& ahead) {
        Vec acc[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) acc[m] = load(sums + m * kTileRows);
        // A product takes as long as the sums of two runs, and so does storing it: the next but one
        // is on its way, and the next is stored, while a run's sums are added.
        alignas(64) int32_t dots[2][kTileSums];
        const auto multiplied = [&]<int I>(int64_t run) {
            if (run >= tile.runs) return;
            tile_zero<I>();
            tile_load<4 + I % 2>(x.codes + run * kPanelRows * kRun, kRun);
            tile_load<6 + I % 2>(tile.codes + run * kTileRows * kRun, 64);
            tile_multiply_bytes<I, 4 + I % 2, 6 + I % 2>();
        };
        multiplied.template operator()<0>(0);
        multiplied.template operator()<1>(1);
        tile_store<0>(dots[0], 64);
        for (int64_t first = 0; first < tile.runs; first += kTiles) {
            for_tiles<kTiles>([&]<int I>() {
                const int64_t run = first + I;
                if (run >= tile.runs) return;
                multiplied.template operator()<(I + 2) % kTiles>(run + 2);
                if (run + 1 < tile.runs) tile_store<(I + 1) % kTiles>(dots[(I + 1) % 2], 64);
                ahead.fetch();
                accumulate<S, M>(tile, x, run, dots[I % 2], acc);
            });
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) store(sums + m * kTileRows, acc[m]);
    }

    template <Scaling S, int M>
    static inline __attribute__((always_inline)) void accumulate(const CodeTile& tile,
                                                                 const Panel& x, int64_t run,
                                                                 const int32_t* dots,
                                                                 Vec (&acc)[M]) {
        const Vec scales = load(tile.scales + run * kTileRows);
        const Vec others = load(tile.others + run * kTileRows);
        const int64_t at = run * kPanelRows;
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const __m512i products = _mm512_load_si512(dots + m * kTileRows);
            const __m512i dot = _mm512_add_epi32(products, _mm512_set1_epi32(x.starts[0][at + m]));
            acc[m] = added<S>(acc[m], dot, scales, others, x, at + m);
        }
    }
};

}  // namespace moesd::MOESD_ISA
