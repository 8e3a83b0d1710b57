// The decoder of each weight format.
#pragma once

#include "floats.h"
#include "fused_tile.h"
#include "ggml_k.h"
#include "integers.h"

namespace moesd::MOESD_ISA {

// Writes weights [k, k + n) of `count` rows to out, each `stride` after the one before it, and
// fills up the last run; k is a multiple of kRun.
template <class X>
using Decode = void(const StoredRow* rows, int64_t count, int64_t k, int64_t n, X* out,
                    int64_t stride);

template <class X, template <class> class Format>
void decode(const StoredRow* rows, int64_t count, int64_t k, int64_t n, X* out, int64_t stride) {
    int64_t row = 0;
    for (; row + 2 <= count; row += 2, out += 2 * stride) {
        Format<X> first(rows[row]), second(rows[row + 1]);
        typename Format<X>::Place at(k, rows[row]);
        for (int64_t i = 0; i < n; i += kRun, at.next()) {
            decode_two(first, second, at, out + i, out + stride + i);
        }
    }
    if (row == count) return;
    Format<X> weights(rows[row]);
    typename Format<X>::Place at(k, rows[row]);
    for (int64_t i = 0; i < n; i += kRun, at.next()) decode_one(weights, at, out + i);
}

template <class X>
struct Decoder {
    Decode<X>* runs;      // null for weights that are stored as X
    FusedTile<X>* fused;  // null unless kFused<X>
};

template <class X, template <class> class Format>
constexpr Decoder<X> decoder() {
    if constexpr (kFused<X>) return {decode<X, Format>, fused_tiles<X, Format>};
    else return {decode<X, Format>, nullptr};
}

// f.template operator()<Format>() of the format's class template; `plain` for plain weights.
template <class Result, class F>
constexpr Result of_format(WeightFormat format, const Result& plain, const F& f) {
    switch (format) {
        case WeightFormat::kPlain: break;
        case WeightFormat::kFp8Block: return f.template operator()<Fp8Block>();
        case WeightFormat::kMxfp4: return f.template operator()<Mxfp4>();
        case WeightFormat::kInt8: return f.template operator()<Int8>();
        case WeightFormat::kInt4: return f.template operator()<Int4>();
        case WeightFormat::kQ8_0: return f.template operator()<Q8_0>();
        case WeightFormat::kQ4_0: return f.template operator()<Q4_0>();
        case WeightFormat::kQ4_1: return f.template operator()<Q4_1>();
        case WeightFormat::kQ5_0: return f.template operator()<Q5_0>();
        case WeightFormat::kQ5_1: return f.template operator()<Q5_1>();
        case WeightFormat::kQ4_K: return f.template operator()<Q4_K>();
        case WeightFormat::kQ5_K: return f.template operator()<Q5_K>();
        case WeightFormat::kQ6_K: return f.template operator()<Q6_K>();
    }
    return plain;
}

template <class X>
constexpr Decoder<X> decoder_of(WeightFormat format) {
    return of_format(format, Decoder<X>{nullptr, nullptr},
                     []<template <class> class Format>() { return decoder<X, Format>(); });
}

}  // namespace moesd::MOESD_ISA
