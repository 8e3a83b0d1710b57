// How the threads of a team share a kernel's work.
#pragma once

#include "../wait.h"

namespace moesd::MOESD_ISA {

// Work items, taken one at a time; `wait` returns when all items are finished, whoever took them.
// Both counts have a cache line of their own: each change takes the line from all other threads'
// caches, and must not take with it what those threads only read.
struct alignas(128) Counter {
    std::atomic<int64_t> taken{0};
    int64_t total;
    alignas(128) std::atomic<int64_t> finished{0};
    explicit Counter(int64_t n) : total(n) {}
    int64_t take() { return taken.fetch_add(1, std::memory_order_relaxed); }
    void finish(int64_t n) { finished.fetch_add(n, std::memory_order_release); }
    void wait() const { wait_for(finished, total); }
};

// Rows of little work each, taken in runs of adjacent rows: fetching the counter's cache line from
// another core can take longer than a row. There are a few runs for each thread, so that a thread
// that was interrupted takes fewer.
class Rows {
    static constexpr int64_t kRuns = 4;

public:
    Rows(int64_t count, int threads)
        : count_(count),
          run_((count + kRuns * threads - 1) / (kRuns * threads)),
          runs_(run_ > 0 ? (count + run_ - 1) / run_ : 0) {}

    // Calls f(row) for the rows that this thread takes.
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
