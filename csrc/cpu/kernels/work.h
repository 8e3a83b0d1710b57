// How the threads of a team share a kernel's work.
#pragma once

#include <atomic>
#include <cstdint>

namespace moesd::MOESD_ISA {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Work taken item by item; `wait` returns when every item taken by anyone is finished. On cache
// lines of its own: every `take` costs the other threads the line, and they must not lose what they
// only read with it.
struct alignas(128) Counter {
    std::atomic<int64_t> taken{0};
    int64_t total;
    alignas(128) std::atomic<int64_t> finished{0};
    explicit Counter(int64_t n) : total(n) {}
    int64_t take() { return taken.fetch_add(1, std::memory_order_relaxed); }
    void finish(int64_t n) { finished.fetch_add(n, std::memory_order_release); }
    void wait() const {
        while (finished.load(std::memory_order_acquire) < total) pause();
    }
};

// Rows of little work each, taken in runs: a `take` per row costs more than the row when the
// counter's line has to come from another core. A few runs per thread let one that was held up do
// less.
class Rows {
    static constexpr int64_t kRuns = 4;

public:
    Rows(int64_t count, int threads)
        : count_(count),
          run_((count + kRuns * threads - 1) / (kRuns * threads)),
          runs_(run_ > 0 ? (count + run_ - 1) / run_ : 0) {}

    // f(row) for the rows that fall to this thread.
    template <class F>
    void share(const F& f) {
        int64_t done = 0;
        for (int64_t i; (i = runs_.take()) < runs_.total; ++done) {
            const int64_t end = (i + 1) * run_ < count_ ? (i + 1) * run_ : count_;
            for (int64_t row = i * run_; row < end; ++row) f(row);
        }
        runs_.finish(done);
    }

    // Returns when every thread's rows are done.
    void wait() const { runs_.wait(); }

private:
    const int64_t count_, run_;
    Counter runs_;
};

}  // namespace moesd::MOESD_ISA
