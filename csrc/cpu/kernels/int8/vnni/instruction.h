// The instruction of AVX-512-VNNI, by name: around the intrinsic GCC 12 copies accumulators, and
// tiles of them spill at every step.
#pragma once

#include "../../../types.h"

namespace moesd::MOESD_ISA {

// Adds to each lane of `acc` the products of its four bytes; those of `a` have no sign.
inline void add_products(__m512i& acc, __m512i a, __m512i b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

// The same with four bytes at `b` for all lanes.
inline void add_products(__m512i& acc, __m512i a, const int8_t* b) {
    using Four = const int8_t (*)[4];
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(a), "m"(*reinterpret_cast<Four>(b)));
}

}  // namespace moesd::MOESD_ISA
