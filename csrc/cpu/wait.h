// Waiting for the other threads of a team: a short spin, which is mostly all it takes, then
// yielding to whoever else has work on this core, which may be the thread waited for.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

namespace moesd {

// About a tenth of a millisecond: longer than a team's threads arrive apart on idle cores, shorter
// than a scheduler's slice.
constexpr int kSpins = 4000;

static inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Returns when `count` has reached `total`.
static inline void wait_for(const std::atomic<int64_t>& count, int64_t total) {
    for (int spins = 0; count.load(std::memory_order_acquire) < total; ++spins) {
        if (spins < kSpins) pause();
        else sched_yield();
    }
}

}  // namespace moesd
