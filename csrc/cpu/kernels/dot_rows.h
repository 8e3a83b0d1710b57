// Register-tiled dot products of several activation rows with many weight rows: tiles, their order,
// and what they prefetch.
#pragma once

#include "dot.h"
#ifdef MOESD_AVX512_BF16
#include "dot_pairs.h"
#endif
#include "for_size.h"

namespace moesd::MOESD_ISA {

constexpr int64_t kFarBytes = 2048, kNearBytes = 256;
constexpr int64_t kMaxQuarter = 32;  // rows of a call that one of its four streams reads

// What a tile fetches from memory while it computes: at every step one line of each of up to four
// weight rows. They go to the second-level cache, because the first can wait for too few lines at
// once to keep memory busy (Zen 4: half as fast). From there to the first a tile fetches its own
// rows, kNearBytes ahead.
struct Prefetch {
    const char* at;    // where the first of the rows is read on from, until step `cut` ...
    const char* then;  // ... and from there on
    int64_t cut = 0;
    // Bytes from the first row to the others; repeating one costs nothing.
    int64_t rest[3] = {0, 0, 0};
    // Bytes a step; zero to stay on a line that is in the cache anyway.
    int64_t advance = 0;
};

// Four weight rows, a quarter of all rows apart: `depth` elements in whole steps, then maybe one
// step more from zero-padded copies. From group to group each of the four goes on to the next row,
// so that memory is read as four long streams, which the machine's own prefetchers follow (four
// rows that lie together: a quarter slower).
template <class W>
struct Group {
    const W* rows[4];
    int64_t depth;
    const W (*tail)[Dot<W>::kStep];
};

// out[m * ld + n] = xs[m][k0:] . row n of the group, added to what is there when k0 > 0.
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
    const int64_t second = prefetch.rest[0], third = prefetch.rest[1], fourth = prefetch.rest[2];
    const int64_t advance = prefetch.advance;
    const char* at = prefetch.at;
    int64_t k = 0;
    const auto run_to = [&](int64_t end) {
        for (; k < end; k += D::kStep) {
            __builtin_prefetch(at, 0, 2), __builtin_prefetch(at + second, 0, 2);
            __builtin_prefetch(at + third, 0, 2), __builtin_prefetch(at + fourth, 0, 2);
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) __builtin_prefetch(w[n] + k + kNearBytes / sizeof(W));
            at += advance;
            D::step(acc, x, w, k);
        }
    };
    run_to(prefetch.cut);
    at = prefetch.then;
    run_to(group.depth);
    if (group.tail) {
        const W* const last[4] = {group.tail[0] - k, group.tail[1] - k, group.tail[2] - k,
                                  group.tail[3] - k};
        D::step(acc, x, last, k);
    }
    if (k0 > 0) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m, out += ld) {
            store(out, add(load_quad(out), sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3])));
        }
    } else {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m, out += ld) {
            store(out, sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]));
        }
    }
}

// Depth is walked in nearly equal blocks of at most this many bytes of an activation row: a pair of
// tiles and two groups of weight rows then stay in the first-level cache. What is a little longer
// stays whole: a block more costs more than that. Blocks depend on the depth alone, so rows keep
// their bits.
constexpr int64_t kDepthBytes = 2048, kWholeBytes = 3072;

template <class W>
inline int64_t depth_block(int64_t depth) {
    constexpr int64_t size = sizeof(typename Dot<W>::Act), most = kDepthBytes / size,
                      step = Dot<W>::kStep;
    if (depth * size <= kWholeBytes) return depth > 0 ? depth : step;
    const int64_t blocks = (depth + most - 1) / most;
    return ((depth + blocks - 1) / blocks + step - 1) / step * step;
}

// The rows that visit t of `tiles` to a group of four fetches. A lone tile reads its own group, a
// little ahead of itself, and goes on into the next group. Two share the next group, two rows each.
// Of more, the first two find it in the second-level cache, because all of them have shared what
// the next block of the depth has in its place (`later`): memory is then read all the time, and not
// only while some tiles run.
template <class W>
inline Prefetch prefetch_for(int t, int tiles, const W* group, const W* following, const W* later,
                             int64_t apart, int64_t depth) {
    constexpr int64_t kSize = sizeof(W), kReach = kFarBytes / kSize,
                      kAdvance = Dot<W>::kStep * kSize;
    const int64_t row = apart * kSize;  // to the next of the four
    const auto address = [](const W* p) { return reinterpret_cast<const char*>(p); };
    if (tiles == 1) {
        const int64_t cut = depth > kReach ? (depth - kReach) / Dot<W>::kStep * Dot<W>::kStep : 0;
        const char* then = address(following ? following : group);
        return {address(group + kReach), then, cut, {row, 2 * row, 3 * row}, kAdvance};
    }
    // Of `later`, visit t has row t; of three visits the last has two.
    const char* ahead = later && tiles > 2 && t < 4 ? address(later) + t * row : nullptr;
    const int64_t last = ahead && tiles == 3 && t == 2 ? row : 0;
    if (t < 2 && following) {
        const char* at = address(following) + 2 * t * row;
        const int64_t third = ahead ? ahead - at : 0;
        return {at, at, 0, {row, third, third}, kAdvance};
    }
    if (ahead) return {ahead, ahead, 0, {last, last, last}, kAdvance};
    return {address(group), address(group)};
}

// dot_rows for a tile of tokens and a depth of few steps, where setting up a tile and its
// prefetches would cost more than the sums: one call passes over all rows.
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

// Sums leave the tiles group by group; sorts those of one row by the weight row, of which each
// group has one per quarter.
inline void sort_quarters(float* sums, int64_t quarter) {
    alignas(64) float groups[4 * kMaxQuarter];
    std::memcpy(groups, sums, 4 * quarter * sizeof(float));
    int64_t g = 0;
    for (; g + kLanes <= quarter; g += kLanes) {
        const float* in = groups + 4 * g;
        Vec a = load(in), b = load(in + kLanes), c = load(in + 2 * kLanes),
            d = load(in + 3 * kLanes);
        deal_quads(a, b, c, d);
        store(sums + g, a), store(sums + quarter + g, b);
        store(sums + 2 * quarter + g, c), store(sums + 3 * quarter + g, d);
    }
    for (; g < quarter; ++g) {
        for (int n = 0; n < 4; ++n) sums[n * quarter + g] = groups[4 * g + n];
    }
}

// out[m * ld + j] = xs[m] . w[j] for m < count, j < rows <= 4 * kMaxQuarter (columns up to the next
// multiple of 4, or of 16 where the depth is short, are overwritten). `next` is where as many rows
// of the same stride will be read after these, or null.
template <class W>
void dot_rows(const typename Dot<W>::Act* const* xs, int count, const W* w, int64_t stride,
              int64_t rows, int64_t depth, const W* next, float* out, int64_t ld) {
    constexpr int64_t kStep = Dot<W>::kStep;
    // Tiles of nearly equal size: a tile of one row has too few accumulators to hide the latency of
    // an addition.
    const int tiles = (count + kTileTokens - 1) / kTileTokens;
#ifdef MOESD_AVX512_BF16
    if constexpr (std::is_same_v<W, bf16>) {
        if (depth <= 2 * kMaxPairs) {
            return dot_pairs(xs, count, w, stride, rows, depth, next, out, ld);
        }
    }
#endif
    if (depth <= kShortDepth) {
        for (int t = 0; t < tiles; ++t) {
            const int m = count * t / tiles, size = count * (t + 1) / tiles - m;
            for_size<kTileTokens>(size, [&]<int M>() {
                dot_short<W, M>(xs + m, w, stride, rows, depth, out + m * ld, ld);
            });
        }
        return;
    }
    const int64_t whole = depth / kStep * kStep, block = depth_block<W>(whole);
    const int64_t quarter = (rows + 3) / 4, apart = quarter * stride;
    // Tiles [from, to) over group g, in the block of the depth that begins at k0.
    const auto visit = [&](int64_t k0, int64_t g, int from, int to, const W* following,
                           const W* later) {
        const int64_t length = whole - k0 < block ? whole - k0 : block;
        const bool has_tail = k0 + length == whole && whole < depth;
        alignas(64) W tail[4][kStep];
        Group<W> group{{}, length, has_tail ? tail : nullptr};
        for (int n = 0; n < 4; ++n) {
            const int64_t row = g + n * quarter;
            group.rows[n] = w + (row < rows ? row : rows - 1) * stride + k0;
            if (has_tail) pad_step<kStep>(group.rows[n] + length, depth - whole, tail[n]);
        }
        for (int t = from; t < to; ++t) {
            const Prefetch ahead =
                prefetch_for<W>(t, tiles, group.rows[0], following, later, apart, length);
            const int m = count * t / tiles, size = count * (t + 1) / tiles - m;
            for_size<kTileTokens>(size, [&]<int M>() {
                dot_tile<W, M>(xs + m, k0, group, ahead, out + m * ld + 4 * g, ld);
            });
        }
    };
    if (tiles == 1) {  // waits for memory, which is fastest along whole rows
        for (int64_t g = 0; g < quarter; ++g) {
            const W* row = w + g * stride;
            for (int64_t k0 = 0; k0 == 0 || k0 < whole; k0 += block) {
                const bool ends = k0 + block >= whole;
                visit(k0, g, 0, 1,
                      !ends             ? row + k0 + block
                      : g + 1 < quarter ? row + stride
                                        : next,
                      nullptr);
            }
        }
    } else {
        for (int64_t k0 = 0; k0 == 0 || k0 < whole; k0 += block) {
            const W* after = k0 + block >= whole ? next : w + k0 + block;
            for (int pair = 0; pair < tiles; pair += 2) {
                for (int64_t g = 0; g < quarter; ++g) {
                    const W* following = g + 1 < quarter ? w + (g + 1) * stride + k0 : after;
                    const W* later = after ? after + g * stride : nullptr;
                    visit(k0, g, pair, pair + 2 < tiles ? pair + 2 : tiles, following, later);
                }
            }
        }
    }
    for (int m = 0; m < count; ++m) sort_quarters(out + m * ld, quarter);
}

}  // namespace moesd::MOESD_ISA
