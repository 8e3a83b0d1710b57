// Prefetching what will be read next while something else is computed.
#pragma once

#include "../types.h"

namespace moesd::MOESD_ISA {

// Prefetches stretches of memory into the second-level cache, a line of each of their quarters at a
// time, which hardware prefetchers follow; evenly, so that memory is never idle.
template <int Stretches>
struct AheadOf {
    const uint8_t* address;
    int64_t next_stretch, quarter, lines;  // bytes between stretches, and of a quarter; its lines
    int64_t times, due = 0;

    // `first`: the first stretch, or null; `next`: bytes from one to the next; `bytes`: of each;
    // `calls`: of fetch, by which all will have been prefetched.
    AheadOf(const uint8_t* first, int64_t next, int64_t bytes, int64_t calls)
        : address(first),
          next_stretch(next),
          quarter(bytes / 4),
          lines(first ? (quarter + 63) / 64 : 0),
          times(calls > 0 ? calls : 1) {}
    AheadOf(const uint8_t* first, int64_t bytes, int64_t calls)
        requires(Stretches == 1)
        : AheadOf(first, 0, bytes, calls) {}

    void fetch() {
        for (due += lines; due >= times; due -= times, address += 64) {
#pragma GCC unroll 4
            for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 2
                for (int i = 0; i < Stretches; ++i) {
                    __builtin_prefetch(address + q * quarter + i * next_stretch, 0, 2);
                }
            }
        }
    }
};
using Ahead = AheadOf<1>;

}  // namespace moesd::MOESD_ISA
