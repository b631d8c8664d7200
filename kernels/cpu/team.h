// Threads of one OpenMP team that meet and share work within a parallel region.
//
// They wait spinning, for work of microseconds: with OMP_WAIT_POLICY=PASSIVE, which processes that share cores need, OpenMP's own
// barrier sleeps, and waking takes longer than most of the work.

#pragma once

#include <sched.h>
#include <stdint.h>

#include <algorithm>
#include <atomic>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kMostPhases = 8;
constexpr int kSpins = 4000;  // some 50 us; then others may have the core

class Team {
 public:
  explicit Team(int threads) : threads_(threads) {}

  // Waits until all have come. Each thread comes to each phase once, in order.
  void meet(int phase) {
    if (threads_ == 1) return;
    here_[phase].fetch_add(1, std::memory_order_acq_rel);
    for (int spin = 0; here_[phase].load(std::memory_order_acquire) < threads_; ++spin) {
#if defined(__x86_64__)
      _mm_pause();
#endif
      if (spin >= kSpins) sched_yield();
    }
  }

  // Takes the next tasks of a phase, `most` at a time; false when none is left.
  bool take(int phase, int64_t total, int64_t most, int64_t* begin, int64_t* end) {
    *begin = next_[phase].fetch_add(most, std::memory_order_relaxed);
    *end = std::min(*begin + most, total);
    return *begin < total;
  }

  // Tasks to take at a time: neighbours read longer streams, but there must be some for everybody.
  int64_t at_once(int64_t total, int64_t most) const { return std::clamp<int64_t>(total / (2 * threads_), 1, most); }

 private:
  const int threads_;
  std::atomic<int> here_[kMostPhases] = {};
  std::atomic<int64_t> next_[kMostPhases] = {};
};

}  // namespace
