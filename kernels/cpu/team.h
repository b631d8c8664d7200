// Threads of one OpenMP team that share work within a parallel region, one phase after another.
//
// A phase ends when its work is done, whoever did it: a thread that comes late, as it slept, holds up no phase, and takes part from
// where the others are (the parallel region itself ends when all have come). They wait spinning, for microseconds: with OMP_WAIT_POLICY=PASSIVE, which processes that share cores need,
// OpenMP's own barriers sleep, and waking takes longer than most of the work.

#pragma once

#include <sched.h>
#include <stdint.h>

#include <algorithm>
#include <atomic>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kMostPhases = 9;
constexpr int kSpins = 4000;  // some 50 us; then others may have the core

class Team {
 public:
  explicit Team(int threads) : threads_(threads) {}

  // Calls work(begin, end) until all tasks of a phase are taken, at most `most` neighbours at a time, as long streams are read
  // faster; returns when all are done. Each thread goes through the phases in order.
  template <class Work>
  void share(int phase, int64_t total, int64_t most, Work work) {
    const int64_t at_once = std::clamp<int64_t>(total / (2 * threads_), 1, most);
    for (int64_t begin; (begin = next_[phase].fetch_add(at_once, std::memory_order_relaxed)) < total;) {
      const int64_t end = std::min(begin + at_once, total);
      work(begin, end);
      done_[phase].fetch_add(end - begin, std::memory_order_release);
    }
    for (int spin = 0; done_[phase].load(std::memory_order_acquire) < total; ++spin) {
#if defined(__x86_64__)
      _mm_pause();
#endif
      if (spin >= kSpins) sched_yield();
    }
  }

 private:
  const int threads_;
  std::atomic<int64_t> next_[kMostPhases] = {}, done_[kMostPhases] = {};
};

}  // namespace
