// Products on AMX tiles. Weights are read as they lie in memory, activations are packed in panels:
// sixteen weight rows times a panel of sixteen tokens give a tile of sums, in which a row is an
// output and a column is a token.
//
// Invariance: an output accumulates its depth in ascending order, whatever else the tiles hold.
#pragma once

#include <cstring>
#include <utility>

#include "../../kernels/ahead.h"
#include "../../kernels/dot_pairs.h"

namespace moesd::MOESD_ISA {

constexpr int kTile = kPanelRows;  // rows of a tile, and tokens of a panel
constexpr int kTileSums = kTile * kTile;
constexpr int64_t kStepDepth = 32;  // elements of the depth in a tile
constexpr int64_t kStepSize = kTile * kStepDepth;

constexpr int64_t steps_of(int64_t depth) { return (depth + kStepDepth - 1) / kStepDepth; }

// The calling thread's eight tiles, of up to sixteen rows of 64 bytes; configured for as long as
// this object lives.
class Tiles {
public:
    Tiles() { configure({kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile}); }
    // For products of bytes: tiles 0 to 3 hold sums and 4 and 5 the first operand, `rows` rows
    // each, the latter of `depth` bytes; 6 and 7 hold the second, four of the depth in a row.
    Tiles(int rows, int depth) {
        const auto sums = static_cast<uint8_t>(rows), fours = static_cast<uint8_t>(depth / 4);
        const auto width = static_cast<uint8_t>(depth);
        configure({sums, sums, sums, sums, sums, sums, fours, fours},
                  {64, 64, 64, 64, width, width, 64, 64});
    }

    // Clears all tiles. The time of a product is proportional to the rows of its first operand.
    void configure(const uint8_t (&rows)[8],
                   const uint8_t (&row_bytes)[8] = {64, 64, 64, 64, 64, 64, 64, 64}) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; ++i) config.row_bytes[i] = row_bytes[i], config.rows[i] = rows[i];
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
};

template <int I>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(I));
}
template <int I>
inline void tile_load(const void* address, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(address), "r"(row_bytes), "i"(I) : "memory");
}
template <int I>
inline void tile_store(void* address, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(address), "r"(row_bytes), "i"(I)
                 : "memory");
}
template <int Sums, int Weights, int Panel>
inline void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Weights), "i"(Panel));
}
// The same of signed bytes times bytes that are not negative, four to a sum.
template <int Sums, int Signed, int Unsigned>
inline void tile_multiply_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Signed), "i"(Unsigned));
}

// The same of signed bytes times signed bytes.
template <int Sums, int First, int Second>
inline void tile_multiply_signed() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(First), "i"(Second));
}

// Calls f.template operator()<0>() ... <N - 1>(): an instruction names its tiles by constants, so a
// loop over tiles has to be unrolled.
template <int N, class F>
inline __attribute__((always_inline)) void for_tiles(const F& f) {
    [&]<int... I>(std::integer_sequence<int, I...>) {
        (f.template operator()<I>(), ...);
    }(std::make_integer_sequence<int, N>());
}

// Two stretches of memory of `bytes` each.
struct Stretches {
    const uint8_t *first, *second;
    int64_t bytes;
};

// Prefetches the memory that will be read next while tiles compute: two pairs of stretches. A tile
// reads one cache line of each of sixteen rows, a pattern that hardware prefetchers do not follow.
class PrefetchStreams {
public:
    PrefetchStreams() : PrefetchStreams({}, {}, 1) {}
    // Every one of `loads` calls of fetch prefetches a part. Stretches that would not fit into the
    // cache beside what is being read are left out, and tiles wait for memory.
    PrefetchStreams(const Stretches& weights, const Stretches& scales, int64_t loads)
        : weights_(ahead(weights, loads)), scales_(ahead(scales, loads)) {}

    void fetch() { weights_.fetch(), scales_.fetch(); }

private:
    // Of a pair; every processor with AMX has a second-level cache of 2 MB.
    static constexpr int64_t kMaxBytes = 640 * 1024;

    static AheadOf<2> ahead(const Stretches& pair, int64_t loads) {
        const bool fits = 2 * pair.bytes <= kMaxBytes;
        return {fits ? pair.first : nullptr, pair.second - pair.first, pair.bytes, loads};
    }

    AheadOf<2> weights_, scales_;
};

// Up to kTile weight rows. Products take missing rows for zeros, and what lies beyond the depth,
// too.
struct WeightRows {
    const bf16* first;
    int64_t stride;  // elements from row to row
    int64_t step;    // elements from one step of the depth to the next
    int64_t rows;
};

// Tile w * T + t of `sums` = weights[w] times panels[t], for W * T <= 4 tiles of kTileSums.
template <int W, int T>
__attribute__((noinline)) void tile_product(const WeightRows (&weights)[W],
                                            const bf16* const (&panels)[T], int64_t depth,
                                            PrefetchStreams& prefetch, float* sums) {
    static_assert(W * T <= 4 && T <= 2);
    bool whole_rows = true;
    for (const WeightRows& w : weights) whole_rows = whole_rows && w.rows == kTile;
    const int64_t whole = whole_rows ? depth / kStepDepth : 0, steps = steps_of(depth);
    for_tiles<W * T>([]<int I>() { tile_zero<I>(); });
    const auto load_panels = [&](int64_t step) {
        for_tiles<T>([&]<int P>() { tile_load<6 + P>(panels[P] + step * kStepSize, 64); });
    };
    const auto multiply = [&]<int I>() {
        for_tiles<T>([]<int P>() { tile_multiply<I * T + P, 4 + I % 2, 6 + P>(); });
    };
    for (int64_t step = 0; step < whole; ++step) {
        load_panels(step);
        for_tiles<W>([&]<int I>() {
            prefetch.fetch();
            tile_load<4 + I % 2>(weights[I].first + step * weights[I].step,
                                 weights[I].stride * sizeof(bf16));
            multiply.template operator()<I>();
        });
    }
    for (int64_t step = whole; step < steps; ++step) {
        load_panels(step);
        const int64_t k = step * kStepDepth;
        const __mmask32 valid =
            depth - k < kStepDepth ? (uint32_t{1} << (depth - k)) - 1 : ~uint32_t{0};
        for_tiles<W>([&]<int I>() {
            alignas(64) bf16 edge[kStepSize];
            for (int64_t n = 0; n < kTile; ++n) {
                const bf16* row = weights[I].first + n * weights[I].stride + step * weights[I].step;
                _mm512_store_si512(edge + n * kStepDepth,
                                   _mm512_maskz_loadu_epi16(n < weights[I].rows ? valid : 0, row));
            }
            prefetch.fetch();
            tile_load<4 + I % 2>(edge, 64);
            multiply.template operator()<I>();
        });
    }
    for_tiles<W * T>([&]<int I>() { tile_store<I>(sums + I * kTileSums, 64); });
}

// How many tiles of weights `count` panels load from `rows` weight rows, two panels at a time.
constexpr int64_t tile_loads(int64_t count, int64_t rows, int64_t depth) {
    return (count + 1) / 2 * ((rows + kTile - 1) / kTile) * steps_of(depth);
}

// Packs `count` <= kTile activation rows into a panel: for each pair of adjacent elements of the
// depth the pairs of all sixteen tokens, with zeros for missing rows and beyond the depth.
inline void pack_panel(const bf16* const* rows, int count, int64_t depth, bf16* panel) {
    for (int64_t k = 0; k < depth; k += kStepDepth, panel += kStepSize) {
        const __mmask32 valid =
            depth - k < kStepDepth ? (uint32_t{1} << (depth - k)) - 1 : ~uint32_t{0};
        __m512i a[kTile];
#pragma GCC unroll 16
        for (int n = 0; n < kTile; ++n) {
            a[n] =
                n < count ? _mm512_maskz_loadu_epi16(valid, rows[n] + k) : _mm512_setzero_si512();
        }
        transpose16(a, reinterpret_cast<__m512i*>(panel));
    }
}

// Both rounded to bf16 and interleaved: even[0], odd[0], even[1], odd[1], ...
inline __m512i rounded_pairs(Vec even, Vec odd) {
    alignas(64) static constexpr auto kInterleaved = [] {
        struct {
            uint16_t lane[32];
        } order{};
        for (int i = 0; i < 32; ++i) order.lane[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
        return order;
    }();
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    return _mm512_permutexvar_epi16(_mm512_load_si512(&kInterleaved), halves);
}

// Sums by token: out[t] holds token t's sixteen outputs.
inline void sums_by_token(const float* sums, Vec* out) {
    __m512i a[kTile], b[kTile];
#pragma GCC unroll 16
    for (int n = 0; n < kTile; ++n) a[n] = _mm512_loadu_si512(sums + n * kTile);
    transpose16(a, b);
#pragma GCC unroll 16
    for (int n = 0; n < kTile; ++n) out[n] = _mm512_castsi512_ps(b[n]);
}

}  // namespace moesd::MOESD_ISA
