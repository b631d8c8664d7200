// Threads of one process that go through the phases of a job together.
//
// A phase ends when its work is done, whoever did it. The caller works through all phases; helpers come when they can and take what is
// left. One that comes late finds nothing to do, and is not waited for: of a job that is over it reads its own, shared record alone.
// So a process may have more threads than cores that are its own: they use what other processes leave idle, and hold up nothing.
// A phase's end is waited for spinning, for microseconds; then others may have the core.

#pragma once

#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "packed.h"

namespace {

constexpr int kSpins = 4000;  // some 50 us
constexpr std::chrono::microseconds kIdle{200};  // a helper spins between two jobs, where threads may

using Work = std::function<void(int64_t begin, int64_t end, int thread)>;

inline void pause_for_a_moment() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// What a job's threads share; lives as long as any of them looks at it.
struct Job {
  struct Phase {
    int64_t total, at_once;
    Work work;
    std::atomic<int64_t> next{0}, done{0};
  };

  // Each thread takes neighbouring tasks, until all are taken; returns when all are done.
  static void share(Phase& phase, int thread) {
    for (int64_t begin; (begin = phase.next.fetch_add(phase.at_once, std::memory_order_relaxed)) < phase.total;) {
      const int64_t end = std::min(begin + phase.at_once, phase.total);
      phase.work(begin, end, thread);
      phase.done.fetch_add(end - begin, std::memory_order_release);
    }
    for (int spin = 0; phase.done.load(std::memory_order_acquire) < phase.total; ++spin) {
      pause_for_a_moment();
      if (spin >= kSpins) sched_yield();
    }
  }

  void take_part(int thread) {
    if (use_tiles) configure_tiles();
    for (Phase& phase : phases) share(phase, thread);
    if (use_tiles) release_tiles();
  }

  std::deque<Phase> phases;
  int threads;
  bool use_tiles;
  std::atomic<int> entered{1};
};

// The helpers of this library in this process. Never destroyed: they may be at work while the process ends.
class Helpers {
 public:
  static Helpers& all() {
    static Helpers& helpers = *new Helpers;
    return helpers;
  }

  // They may use the cores that the calling thread may use now.
  void start(int count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (static_cast<int>(helpers_.size()) < count) {
      Helper helper{};
      sched_getaffinity(0, sizeof(helper.cores), &helper.cores);
      std::thread thread([this] { help(); });
      helper.thread = thread.native_handle();
      thread.detach();
      helpers_.push_back(helper);
      avoided_ = -1;
    }
  }

  // The job stays until the next one comes: who wakes up later finds nothing left to do in it.
  void call(const std::shared_ptr<Job>& job) {
    start(job->threads - 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      avoid_core(sched_getcpu());
      job_ = job;
      number_.fetch_add(1, std::memory_order_release);
    }
    changed_.notify_all();
  }

 private:
  struct Helper {
    pthread_t thread;
    cpu_set_t cores;
  };

  // Keeps helpers off the caller's core: Linux may wake one there and leave it waiting behind the caller for the whole job, with
  // other cores idle.
  void avoid_core(int core) {
    if (core == avoided_ || core < 0) return;
    avoided_ = core;
    for (const Helper& helper : helpers_) {
      cpu_set_t others = helper.cores;
      CPU_CLR(core, &others);
      if (CPU_COUNT(&others)) pthread_setaffinity_np(helper.thread, sizeof(others), &others);
    }
  }

  void help() {
    for (uint64_t seen = 0;;) {
      spin_until_other_than(seen);
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return number_.load(std::memory_order_relaxed) != seen; });
        seen = number_.load(std::memory_order_relaxed);
        job = job_;
      }
      const int thread = job->entered.fetch_add(1);
      if (thread < job->threads) job->take_part(thread);
    }
  }

  void spin_until_other_than(uint64_t seen) {
    if (idle_ == idle_.zero()) return;
    const auto end = std::chrono::steady_clock::now() + idle_;
    while (number_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < end) pause_for_a_moment();
  }

  // Where processes share cores, threads that spin between jobs take them from others: OMP_WAIT_POLICY says so to OpenMP's too.
  static std::chrono::microseconds time_to_spin() {
    const char* policy = getenv("OMP_WAIT_POLICY");
    return policy && (strcmp(policy, "PASSIVE") == 0 || strcmp(policy, "passive") == 0) ? kIdle.zero() : kIdle;
  }

  const std::chrono::microseconds idle_ = time_to_spin();
  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<uint64_t> number_{0};
  std::shared_ptr<Job> job_;
  std::vector<Helper> helpers_;
  int avoided_ = -1;
};

class Team {
 public:
  Team(int threads, bool use_tiles) : job_(std::make_shared<Job>()) {
    job_->threads = std::max(threads, 1);
    job_->use_tiles = use_tiles;
  }

  // Adds a phase: work(begin, end, thread) for `total` tasks, at most `most` neighbours at a time, as long streams are read faster.
  // What work refers to must live until run() returns; thread is below the number of threads.
  void phase(int64_t total, int64_t most, Work work) {
    job_->phases.emplace_back();
    Job::Phase& phase = job_->phases.back();
    phase.total = total;
    phase.at_once = std::clamp<int64_t>(total / (2 * job_->threads), 1, most);
    phase.work = std::move(work);
  }

  // Goes through the phases in their order; returns when all is done.
  void run() {
    if (job_->threads == 1) return job_->take_part(0);
    Helpers::all().call(job_);
    job_->take_part(0);
  }

 private:
  std::shared_ptr<Job> job_;
};

}  // namespace
