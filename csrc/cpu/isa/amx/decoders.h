// Sixteen weight rows decoded together, a run of each after another, as tiles take them.
#pragma once

#include <utility>

#include "../../kernels/formats/decoders.h"
#include "tiles.h"

namespace moesd::MOESD_ISA {

static_assert(kRun == kStepDepth);

using DecodedRun = bf16[kRun];

// Bytes of a row that are prefetched into the first-level cache where rows lie a power of two
// apart: few sets hold them all, and hardware prefetchers lose them.
constexpr int64_t kCodesAhead = 192;

template <class Row>
struct DecoderRows {
    Row of[kTile];

    explicit DecoderRows(const StoredRow (&rows)[kTile])
        : DecoderRows(rows, std::make_integer_sequence<int, kTile>()) {}

private:
    template <int... R>
    DecoderRows(const StoredRow (&rows)[kTile], std::integer_sequence<int, R...>)
        : of{Row(rows[R])...} {}
};

// Decodes a run of each row at a time.
template <template <class> class Format>
class RunDecoder {
    using Row = Format<bf16>;

public:
    explicit RunDecoder(const StoredRow (&rows)[kTile]) : rows_(rows) {}

    void decode(const typename Row::Place& at, DecodedRun* out) {
        for (int r = 0; r < kTile; r += 2) {
            decode_two(rows_.of[r], rows_.of[r + 1], at, out[r], out[r + 1]);
        }
    }

private:
    DecoderRows<Row> rows_;
};

// All rows of most tiles are in one square, whose palette then serves them.
template <>
class RunDecoder<Fp8Block> {
    using Row = Fp8Block<bf16>;

public:
    explicit RunDecoder(const StoredRow (&rows)[kTile]) : rows_(rows), share_scales_(true) {
        for (const Row& row : rows_.of) {
            share_scales_ = share_scales_ && row.scales() == rows_.of[0].scales();
        }
    }

    void decode(const Row::Place& at, DecodedRun* out) const {
        if (share_scales_ && at.k + kRun <= at.depth) {
            const ScaledE4m3<bf16> numbers = at.numbers;
#pragma GCC unroll 16
            for (int r = 0; r < kTile; ++r) {
                const uint8_t* const codes = rows_.of[r].codes(at);
                __builtin_prefetch(codes + kCodesAhead);
                numbers.decode(codes, out[r]);
            }
        } else {
            for (int r = 0; r < kTile; ++r) rows_.of[r].decode(at, out[r]);
        }
    }

private:
    const DecoderRows<Row> rows_;
    bool share_scales_;
};

struct Mxfp4Palettes {
    alignas(64) uint16_t of[256][32];

    constexpr Mxfp4Palettes() : of() {
        for (int scale = 0; scale < 256; ++scale) {
            for (int code = 0; code < 32; ++code) of[scale][code] = product(scale, code);
        }
    }

    // The bits of number `code` times 2^(scale - 127): zero where that is too small.
    static constexpr uint16_t product(int scale, int code) {
        const int magnitude = code & 7, sign = (code & 8) << 12;
        if (scale == 255) return 0x7fc0;
        // 0.5, then 1, 1.5, 2, 3, 4 and 6: of two numbers with an exponent the second is 1.5
        // times the first.
        const int exponent = scale + (magnitude == 1 ? -1 : magnitude / 2 - 1);
        if (magnitude == 0 || exponent <= 0) return static_cast<uint16_t>(sign);
        if (exponent >= 255) return static_cast<uint16_t>(sign | 0x7f80);
        const int half = magnitude > 1 && magnitude % 2 == 1 ? 0x40 : 0;
        return static_cast<uint16_t>(sign | exponent << 7 | half);
    }
};
inline constexpr Mxfp4Palettes kMxfp4Palettes{};

// Powers of two times the numbers of four bits are numbers in bf16: nothing is rounded, and the
// palettes of all exponents are there.
template <>
class RunDecoder<Mxfp4> {
    using Row = Mxfp4<bf16>;

public:
    explicit RunDecoder(const StoredRow (&rows)[kTile])
        : codes_(rows[0].data),
          scales_(rows[0].scales),
          to_code_(rows[1].data - rows[0].data),
          to_scale_(rows[1].scales - rows[0].scales) {
        while (count_ < kTile && rows[count_].data != rows[count_ - 1].data) ++count_;
    }

    void decode(const Row::Place& at, DecodedRun* out) const {
        const uint8_t *codes = codes_ + at.k / 2, *scale = scales_ + at.k / kRun;
#pragma GCC unroll 4
        for (int r = 0; r < count_; ++r, codes += to_code_, scale += to_scale_) {
            const uint16_t* palette = kMxfp4Palettes.of[*scale];
            const __m512i words = nibbles<Nibbles::kAdjacent>(codes);
            _mm512_store_si512(out[r], _mm512_permutexvar_epi16(words, _mm512_load_si512(palette)));
        }
    }

private:
    const uint8_t *const codes_, *const scales_;
    const int64_t to_code_, to_scale_;  // from row to row
    int count_ = 1;                     // rows that are no copies
};

// Called after each run of all rows, with its number: for what a processor does at the same time.
class AfterRun {
public:
    template <class F>
    explicit AfterRun(const F& f)
        : call_([](const void* self, int64_t run) { (*static_cast<const F*>(self))(run); }),
          self_(&f) {}

    void operator()(int64_t run) const { call_(self_, run); }

private:
    void (*call_)(const void* self, int64_t run);
    const void* self_;
};

// Writes `runs` runs of the rows from weight k, a multiple of kRun, on: run i of row r to
// out[i * kTile + r]. What lies beyond a row's end is zero; rows that are copies of the one before
// may be left out.
using DecodeTile = void(const StoredRow (&rows)[kTile], int64_t k, int64_t runs, DecodedRun* out,
                        const AfterRun& after);

template <template <class> class Format>
void decode_tile(const StoredRow (&rows)[kTile], int64_t k, int64_t runs, DecodedRun* out,
                 const AfterRun& after) {
    RunDecoder<Format> decoder(rows);
    typename Format<bf16>::Place at(k, rows[0]);
    for (int64_t run = 0; run < runs; ++run, at.next(), out += kTile) {
        decoder.decode(at, out);
        after(run);
    }
}

// Null for weights that are stored as bf16.
constexpr DecodeTile* tile_decoder_of(WeightFormat format) {
    return of_format<DecodeTile*>(
        format, nullptr,
        []<template <class> class Format>() -> DecodeTile* { return decode_tile<Format>; });
}

}  // namespace moesd::MOESD_ISA
