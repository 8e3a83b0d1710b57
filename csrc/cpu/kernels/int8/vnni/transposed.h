// Bytes of sixteen rows, turned round.
#pragma once

#include "../product.h"

namespace moesd::MOESD_ISA {

// Rows that lie evenly apart, read from their beginnings on.
class EvenRows {
public:
    EvenRows(const uint8_t* first, int64_t stride)
        : quarters_{first, first + 4 * stride, first + 8 * stride, first + 12 * stride},
          stride_(stride),
          three_(3 * stride) {}

    const uint8_t* operator()(int r) const {
        const uint8_t* const quarter = quarters_[r / 4];
        switch (r % 4) {
            case 0: return quarter;
            case 1: return quarter + stride_;
            case 2: return quarter + 2 * stride_;
            default: return quarter + three_;
        }
    }
    void skip(int64_t bytes) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) quarters_[q] += bytes;
    }

private:
    const uint8_t* quarters_[4];
    int64_t stride_, three_;
};

// out[i]: the i-th four of the sixteen bytes at `address(row)` of each; zeros from `left` on.
template <class Address>
inline __attribute__((always_inline)) void transpose(const Address& address, __m512i (&out)[4],
                                                     int64_t left = 16) {
    const __mmask16 there = left < 16 ? (1u << left) - 1 : 0xffff;
    __m512i a[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
        const auto quarter = [&](int q) { return _mm_maskz_loadu_epi8(there, address(4 * q + n)); };
        a[n] = _mm512_castsi128_si512(quarter(0));
        a[n] = _mm512_inserti32x4(a[n], quarter(1), 1);
        a[n] = _mm512_inserti32x4(a[n], quarter(2), 2);
        a[n] = _mm512_inserti32x4(a[n], quarter(3), 3);
    }
    const __m512i b0 = _mm512_unpacklo_epi32(a[0], a[1]);
    const __m512i b1 = _mm512_unpackhi_epi32(a[0], a[1]);
    const __m512i b2 = _mm512_unpacklo_epi32(a[2], a[3]);
    const __m512i b3 = _mm512_unpackhi_epi32(a[2], a[3]);
    out[0] = _mm512_unpacklo_epi64(b0, b2), out[1] = _mm512_unpackhi_epi64(b0, b2);
    out[2] = _mm512_unpacklo_epi64(b1, b3), out[3] = _mm512_unpackhi_epi64(b1, b3);
}

}  // namespace moesd::MOESD_ISA
