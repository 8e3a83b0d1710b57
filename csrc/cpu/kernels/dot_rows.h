// Register-tiled dot products of several activation rows with many weight rows: the tiles, the
// order in which they are computed, and the memory that each of them prefetches.
#pragma once

#include "dot.h"
#ifdef MOESD_AVX512_BF16
#include "dot_pairs.h"
#endif
#include "for_size.h"

namespace moesd::MOESD_ISA {

// How far before its use a weight is prefetched: into the second-level cache, and into the first.
constexpr int64_t kFarBytes = 2048, kNearBytes = 256;
// And how many bytes of groups before its own where tiles prefetch them: a short group is computed
// in less time than memory takes to bring another.
constexpr int64_t kAheadBytes = 24 * 1024;

// What a tile prefetches from memory while it computes: at every step one cache line of each of up
// to four weight rows. These lines go to the second-level cache: the first has too few outstanding
// misses to keep memory busy (Zen 4: half as fast). From the second-level cache to the first a tile
// prefetches the rows it is computing with, kNearBytes before their use.
struct Prefetch {
    const char* address;       // in the first of the four rows, at step 0
    const char* next_address;  // the same at element `switch_at` of the depth, where it may jump
    int64_t switch_at = 0;
    // From the first row to the other three, in bytes. A row may be named twice, at no cost.
    int64_t offsets[3] = {0, 0, 0};
    // Bytes from step to step; zero repeats one line, which is cached: nothing is prefetched.
    int64_t advance = 0;
};

// Four weight rows, each in another quarter of all rows: `depth` elements in whole steps, then,
// where `tail` is given, one more step from zero-padded copies. The next group has the next row of
// each quarter, so that memory is read as four long streams, which hardware prefetchers follow
// (four adjacent rows: a quarter slower).
template <class W>
struct Group {
    const W* rows[4];
    int64_t depth;
    const W (*tail)[Dot<W>::kStep];
};

// out[m * ld + n] = xs[m][k0:] . row n of the group; added to what `out` holds when k0 > 0.
template <class W, int M>
__attribute__((noinline)) void dot_tile(const typename Dot<W>::Act* const* xs, int64_t k0,
                                        const Group<W>& group, const Prefetch& prefetch, float* out,
                                        int64_t ld) {
    using D = Dot<W>;
    Vec acc[M][4];
    const typename D::Act* x[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        x[m] = xs[m] + k0;
#pragma GCC unroll 8
        for (int n = 0; n < 4; ++n) acc[m][n] = splat(0.0f);
    }
    const W* const w[4] = {group.rows[0], group.rows[1], group.rows[2], group.rows[3]};
    const int64_t second = prefetch.offsets[0], third = prefetch.offsets[1];
    const int64_t fourth = prefetch.offsets[2], advance = prefetch.advance;
    const char* address = prefetch.address;
    int64_t k = 0;
    const auto run_to = [&](int64_t end) {
        for (; k < end; k += D::kStep) {
            __builtin_prefetch(address, 0, 2), __builtin_prefetch(address + second, 0, 2);
            __builtin_prefetch(address + third, 0, 2), __builtin_prefetch(address + fourth, 0, 2);
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) __builtin_prefetch(w[n] + k + kNearBytes / sizeof(W));
            address += advance;
            D::step(acc, x, w, k);
        }
    };
    run_to(prefetch.switch_at);
    address = prefetch.next_address;
    run_to(group.depth);
    if (group.tail) {
        const W* const last[4] = {group.tail[0] - k, group.tail[1] - k, group.tail[2] - k,
                                  group.tail[3] - k};
        D::step(acc, x, last, k);
    }
    store_sums(acc, k0 > 0, out, ld);
}

// The depth is computed in nearly equal blocks of at most kDepthBytes of an activation row: two
// tiles' activations and two groups of weight rows then stay in the first-level cache. Up to
// kWholeBytes it stays one block, since a second one would cost more than it saves. The blocks
// depend on the depth alone, so a row's results do not depend on how many rows there are.
constexpr int64_t kDepthBytes = 2048, kWholeBytes = 3072;

// Elements of a block of the depth, a multiple of a step.
template <class W>
inline int64_t depth_block(int64_t depth) {
    constexpr int64_t kSize = sizeof(typename Dot<W>::Act), kStep = Dot<W>::kStep;
    constexpr int64_t kMost = kDepthBytes / kSize;
    if (depth * kSize <= kWholeBytes) return depth > 0 ? depth : kStep;
    const int64_t blocks = (depth + kMost - 1) / kMost;
    return ((depth + blocks - 1) / blocks + kStep - 1) / kStep * kStep;
}

// What tile t of `tiles` prefetches while it computes with `group`. A single tile prefetches its
// own group, kFarBytes before their use, and at its end the beginning of the next group. Of two
// tiles each prefetches two rows of the next group. Of more tiles the first two do so, too, and the
// first four share the rows of the group at the same place in the next block of the depth
// (`next_block`): memory is then read during all of them, and in that block the first two find
// their rows in the second-level cache. `row_stride`: elements from row to row of a group.
template <class W>
inline Prefetch prefetch_for(int t, int tiles, const W* group, const W* next_group,
                             const W* next_block, int64_t row_stride, int64_t depth) {
    constexpr int64_t kSize = sizeof(W), kStep = Dot<W>::kStep;
    constexpr int64_t kReach = kFarBytes / kSize, kAdvance = kStep * kSize;
    const int64_t row = row_stride * kSize;
    const auto bytes = [](const W* p) { return reinterpret_cast<const char*>(p); };
    if (tiles == 1) {
        const int64_t switch_at = depth > kReach ? (depth - kReach) / kStep * kStep : 0;
        const char* next = bytes(next_group ? next_group : group);
        return {bytes(group + kReach), next, switch_at, {row, 2 * row, 3 * row}, kAdvance};
    }
    // Tile t takes row t of the next block's group; the last of three tiles takes rows 2 and 3.
    const char* later = next_block && tiles > 2 && t < 4 ? bytes(next_block) + t * row : nullptr;
    const int64_t other = later && tiles == 3 && t == 2 ? row : 0;
    if (t < 2 && next_group) {
        const char* next = bytes(next_group) + 2 * t * row;
        const int64_t third = later ? later - next : 0;
        return {next, next, 0, {row, third, third}, kAdvance};
    }
    if (later) return {later, later, 0, {other, other, other}, kAdvance};
    return {bytes(group), bytes(group)};
}

// dot_rows for one tile of activation rows and a depth of few steps, where setting up a group and
// its prefetches would cost more than the sums: one call computes with all weight rows.
template <class W, int M>
__attribute__((noinline)) void dot_short(const typename Dot<W>::Act* const* xs, const W* w,
                                         int64_t stride, int64_t rows, int64_t depth, float* out,
                                         int64_t ld) {
    using D = Dot<W>;
    const typename D::Act* x[M];
    for (int m = 0; m < M; ++m) x[m] = xs[m];
    const int64_t whole = depth / D::kStep * D::kStep;
    for (int64_t j = 0; j < rows; j += 4, w += 4 * stride) {
        Vec acc[M][4];
        const W* group[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
            group[n] = w + (j + n < rows ? n : rows - 1 - j) * stride;
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) acc[m][n] = splat(0.0f);
        }
        for (int64_t k = 0; k < whole; k += D::kStep) D::step(acc, x, group, k);
        if (whole < depth) {
            alignas(64) W tail[4][D::kStep];
            for (int n = 0; n < 4; ++n) {
                pad_step<D::kStep>(group[n] + whole, depth - whole, tail[n]);
                group[n] = tail[n] - whole;
            }
            D::step(acc, x, group, whole);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            store(out + m * ld + j, sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]));
        }
    }
}

constexpr int64_t kShortDepth = 128;

// dot_rows over a depth of many steps; members as its arguments. Where weights are, each visit is
// told: those that were decoded lie in a buffer, a block of the depth at a time.
template <class W>
struct GroupedRows {
    static constexpr int64_t kStep = Dot<W>::kStep;

    const typename Dot<W>::Act* const* xs;
    int count, tiles;
    int64_t stride, rows, depth;
    float* out;
    int64_t ld;
    int64_t whole = depth / kStep * kStep;
    int64_t block = depth_block<W>(whole);
    int64_t quarter = (rows + 3) / 4;

    int64_t length_at(int64_t k0) const { return whole - k0 < block ? whole - k0 : block; }

    // Tiles [first_tile, end_tile) of the activation rows with group g, in the block of the depth
    // that begins at k0. `w`: element k0 of the first weight row; prefetch(t): what tile t
    // prefetches.
    template <class F>
    void visit(const W* w, int64_t k0, int64_t g, int first_tile, int end_tile,
               const F& prefetch) const {
        const int64_t length = length_at(k0);
        const bool has_tail = k0 + length == whole && whole < depth;
        alignas(64) W tail[4][kStep];
        Group<W> group{{}, length, has_tail ? tail : nullptr};
        for (int n = 0; n < 4; ++n) {
            const int64_t row = g + n * quarter;
            group.rows[n] = w + (row < rows ? row : rows - 1) * stride;
            if (has_tail) pad_step<kStep>(group.rows[n] + length, depth - whole, tail[n]);
        }
        for (int t = first_tile; t < end_tile; ++t) {
            const Prefetch fetch = prefetch(t);
            const int m = count * t / tiles, size = count * (t + 1) / tiles - m;
            for_size<kTileTokens>(size, [&]<int M>() {
                dot_tile<W, M>(xs + m, k0, group, fetch, out + m * ld + 4 * g, ld);
            });
        }
    }

    // One tile waits for memory, which is fastest along whole rows: all blocks of a group at once.
    void visit_by_group(const W* w, const W* next) const {
        for (int64_t g = 0; g < quarter; ++g) {
            const W* row = w + g * stride;
            const W* next_group = g + 1 < quarter ? row + stride : next;
            for (int64_t k0 = 0; k0 == 0 || k0 < whole; k0 += block) {
                const W* following = k0 + block >= whole ? next_group : row + k0 + block;
                visit(w + k0, k0, g, 0, 1, [&](int t) {
                    return prefetch_for<W>(t, tiles, row + k0, following, nullptr, quarter * stride,
                                           length_at(k0));
                });
            }
        }
    }

    // Several tiles reuse weights from the first-level cache: all groups of a block for two tiles.
    void visit_by_block(const W* w, const W* next) const {
        const int64_t few = kAheadBytes / (4 * block * static_cast<int64_t>(sizeof(W)));
        const int64_t ahead = few < 1 ? 1 : few < quarter ? few : quarter;
        for (int64_t k0 = 0; k0 == 0 || k0 < whole; k0 += block) {
            const W* next_start = k0 + block >= whole ? next : w + k0 + block;
            for (int pair = 0; pair < tiles; pair += 2) {
                for (int64_t g = 0; g < quarter; ++g) {
                    const W* group = w + g * stride + k0;
                    const W* next_group = g + ahead < quarter ? group + ahead * stride
                                          : next_start ? next_start + (g + ahead - quarter) * stride
                                                       : nullptr;
                    const W* next_block = next_start ? next_start + g * stride : nullptr;
                    visit(w + k0, k0, g, pair, pair + 2 < tiles ? pair + 2 : tiles, [&](int t) {
                        return prefetch_for<W>(t, tiles, group, next_group, next_block,
                                               quarter * stride, length_at(k0));
                    });
                }
            }
        }
    }
};

// Tiles of nearly equal size: a tile of one row has too few accumulators to hide the latency of an
// addition.
constexpr int tiles_of(int count) { return (count + kTileTokens - 1) / kTileTokens; }

// Whether dot_rows computes with the whole depth at once.
template <class W>
constexpr bool is_short(int64_t depth) {
#ifdef MOESD_AVX512_BF16
    if (std::is_same_v<W, bf16>) return depth <= 2 * kMaxPairs;
#endif
    return depth <= kShortDepth;
}

// out[m * ld + j] = xs[m] . w[j * stride] for m < count, j < rows <= 4 * kMaxQuarter (columns up to
// the next multiple of 4, or of 16 where the depth is short, are overwritten). `next`: as many rows
// of the same stride, which will be read after these; or null.
template <class W>
void dot_rows(const typename Dot<W>::Act* const* xs, int count, const W* w, int64_t stride,
              int64_t rows, int64_t depth, const W* next, float* out, int64_t ld) {
#ifdef MOESD_AVX512_BF16
    if constexpr (std::is_same_v<W, bf16>) {
        if (is_short<W>(depth)) {
            return dot_pairs(xs, count, w, stride, rows, depth, next, out, ld);
        }
    }
#endif
    const int tiles = tiles_of(count);
    if (is_short<W>(depth)) {
        for (int t = 0; t < tiles; ++t) {
            const int m = count * t / tiles, size = count * (t + 1) / tiles - m;
            for_size<kTileTokens>(size, [&]<int M>() {
                dot_short<W, M>(xs + m, w, stride, rows, depth, out + m * ld, ld);
            });
        }
        return;
    }
    const GroupedRows<W> groups{xs, count, tiles, stride, rows, depth, out, ld};
    if (tiles == 1) {
        groups.visit_by_group(w, next);
    } else {
        groups.visit_by_block(w, next);
    }
    for (int m = 0; m < count; ++m) sort_quarters(out + m * ld, groups.quarter);
}

}  // namespace moesd::MOESD_ISA
