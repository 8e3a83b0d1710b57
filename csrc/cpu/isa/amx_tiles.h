// Products on AMX tiles. The weights are the operand that is read as it lies: sixteen of their rows
// times a panel of sixteen activation rows give a tile of sums, an output to each row and a token
// to each column.
//
// Invariance: an output accumulates its depth in ascending order, whatever else the tiles hold.
#pragma once

#include <cstring>
#include <utility>

#include "../kernels/dot.h"

namespace moesd::MOESD_ISA {

constexpr int kTile = kPanelRows;  // rows of a tile, and tokens of a panel
constexpr int kTileSums = kTile * kTile;
constexpr int64_t kStepDepth = 32;  // elements of the depth in a tile
constexpr int64_t kStepSize = kTile * kStepDepth;

constexpr int64_t steps_of(int64_t depth) { return (depth + kStepDepth - 1) / kStepDepth; }

// The calling thread's tiles, configured for as long as this lives: eight of up to sixteen rows of
// 64 bytes.
class Tiles {
public:
    Tiles() { configure({kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile}); }

    // Tiles are zero afterwards. A product takes as long as its first operand has rows.
    void configure(const uint8_t (&rows)[8]) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = rows[i];
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
inline void tile_load(const void* at, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(row_bytes), "i"(I) : "memory");
}
template <int I>
inline void tile_store(void* at, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(row_bytes), "i"(I) : "memory");
}
template <int Sums, int Weights, int Panel>
inline void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Weights), "i"(Panel));
}

// f.operator()<0>() ... f.operator()<N - 1>(): tiles have no addresses, so loops over them are
// unrolled by hand.
template <int N, class F>
inline __attribute__((always_inline)) void for_tiles(const F& f) {
    [&]<int... I>(std::integer_sequence<int, I...>) {
        (f.template operator()<I>(), ...);
    }(std::make_integer_sequence<int, N>());
}

// Memory that is read next, fetched into the second-level cache while tiles compute: two stretches
// of the same length, each as four streams that lie a quarter apart. A tile takes a line of sixteen
// rows at a time, which the machine's own prefetchers do not follow; these streams they do, and
// several keep memory busier than one.
class Ahead {
public:
    // `bytes` of each stretch, spread over the loads of `loads` tiles of weights. Nothing when
    // `first` is null, or when the cache would not hold this besides what is being read: tiles then
    // wait for memory themselves.
    Ahead(const bf16* first, const bf16* second, int64_t bytes, int64_t loads)
        : at_(reinterpret_cast<const char*>(first)),
          other_(first ? reinterpret_cast<const char*>(second) - at_ : 0),
          quarter_(bytes / 4 / 64 * 64),
          lines_(first && loads > 0 && 2 * bytes <= kMostAhead
                     ? (bytes / 4 / 64 + loads - 1) / loads
                     : 0) {}

    void fetch() {
        for (int64_t i = 0; i < lines_; ++i, at_ += 64) {
#pragma GCC unroll 4
            for (int q = 0; q < 4; ++q) {
                __builtin_prefetch(at_ + q * quarter_);
                __builtin_prefetch(at_ + q * quarter_ + other_);
            }
        }
    }

private:
    // Of a second-level cache of 2 MB, which every processor with AMX has.
    static constexpr int64_t kMostAhead = 640 * 1024;

    const char* at_;
    const int64_t other_, quarter_, lines_;
};

// Up to kTile rows; those that are missing count as zero, as does the depth beyond its end.
struct WeightRows {
    const bf16* at;
    int64_t stride;  // elements from row to row
    int64_t rows;
};

// sums[w * T + t] = weights[w] times panels[t], sums of kTileSums, for W * T <= 4 tiles.
template <int W, int T>
__attribute__((noinline)) void tile_product(const WeightRows (&weights)[W],
                                            const bf16* const (&panels)[T], int64_t depth,
                                            Ahead& ahead, float* sums) {
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
            ahead.fetch();
            tile_load<4 + I % 2>(weights[I].at + step * kStepDepth,
                                 weights[I].stride * sizeof(bf16));
            multiply.template operator()<I>();
        });
    }
    for (int64_t step = whole; step < steps; ++step) {
        load_panels(step);
        const int64_t k = step * kStepDepth;
        const __mmask32 inside =
            depth - k < kStepDepth ? (uint32_t{1} << (depth - k)) - 1 : ~uint32_t{0};
        for_tiles<W>([&]<int I>() {
            alignas(64) bf16 edge[kStepSize];
            for (int64_t n = 0; n < kTile; ++n) {
                const bf16* row = weights[I].at + n * weights[I].stride + k;
                _mm512_store_si512(edge + n * kStepDepth,
                                   _mm512_maskz_loadu_epi16(n < weights[I].rows ? inside : 0, row));
            }
            ahead.fetch();
            tile_load<4 + I % 2>(edge, 64);
            multiply.template operator()<I>();
        });
    }
    for_tiles<W * T>([&]<int I>() { tile_store<I>(sums + I * kTileSums, 64); });
}

// finish(w, p, first, second) for every pair of tiles w and w + 1 of up to four tiles of weight
// rows and each of `count` panels, `panel_size` apart.
template <class F>
void panels_product(const WeightRows (&w)[4], const bf16* panels, int64_t panel_size, int64_t count,
                    int64_t depth, Ahead& ahead, const F& finish) {
    alignas(64) float sums[4 * kTileSums];
    const auto tile = [&](int i) { return sums + i * kTileSums; };
    int64_t p = 0;
    for (; p + 2 <= count; p += 2) {
        const bf16* const pair[2] = {panels + p * panel_size, panels + (p + 1) * panel_size};
        for (int half = 0; half < 4 && w[half].rows > 0; half += 2) {
            tile_product<2, 2>({w[half], w[half + 1]}, pair, depth, ahead, sums);
            for (int t = 0; t < 2; ++t) finish(half, p + t, tile(t), tile(2 + t));
        }
    }
    if (p == count) return;
    const bf16* const last[1] = {panels + p * panel_size};
    if (w[2].rows > 0) {
        tile_product<4, 1>(w, last, depth, ahead, sums);
        for (int half = 0; half < 4; half += 2) finish(half, p, tile(half), tile(half + 1));
    } else {
        tile_product<2, 1>({w[0], w[1]}, last, depth, ahead, sums);
        finish(0, p, tile(0), tile(1));
    }
}

// Up to 64 rows as tiles of sixteen.
struct Block {
    WeightRows tiles[4];

    Block(const bf16* w, int64_t stride, int64_t rows) {
        for (int64_t i = 0; i < 4; ++i) {
            const int64_t left = rows - i * kTile;
            tiles[i] = {w + i * kTile * stride, stride, left < 0 ? 0 : left < kTile ? left : kTile};
        }
    }
};

// How many tiles of weights `count` panels load from `rows` weight rows, two panels at a time.
constexpr int64_t tile_loads(int64_t count, int64_t rows, int64_t depth) {
    return (count + 1) / 2 * ((rows + kTile - 1) / kTile) * steps_of(depth);
}

// A panel from `count` <= kTile rows: pairs of the depth, each of all tokens, zeros where there is
// no row or no more depth.
inline void pack_panel(const bf16* const* rows, int count, int64_t depth, bf16* panel) {
    for (int64_t k = 0; k < depth; k += kStepDepth, panel += kStepSize) {
        const __mmask32 inside =
            depth - k < kStepDepth ? (uint32_t{1} << (depth - k)) - 1 : ~uint32_t{0};
        __m512i a[kTile];
#pragma GCC unroll 16
        for (int n = 0; n < kTile; ++n) {
            a[n] =
                n < count ? _mm512_maskz_loadu_epi16(inside, rows[n] + k) : _mm512_setzero_si512();
        }
        transpose16(a, reinterpret_cast<__m512i*>(panel));
    }
}

// Both rounded to bf16, lane by lane `even` below `odd`.
inline __m512i rounded_pairs(Vec even, Vec odd) {
    alignas(64) static constexpr auto kInterleaved = [] {
        struct {
            uint16_t lane[32];
        } order{};
        for (int i = 0; i < 32; ++i) order.lane[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
        return order;
    }();
    const __m512i apart = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    return _mm512_permutexvar_epi16(_mm512_load_si512(&kInterleaved), apart);
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
