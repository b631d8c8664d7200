// Runs CUDA kernels on a CPU: a block's threads are threads, blocks come one after another, barriers and shuffles are real ones.
// What it cannot show: speed, and mistakes that need two blocks at once.

#pragma once

#include <algorithm>
#include <barrier>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static

struct Index {
  unsigned int x = 1, y = 1;
};

inline thread_local Index threadIdx, blockIdx;
inline Index blockDim, gridDim;

using std::min;

inline float __uint_as_float(unsigned int bits) { return std::bit_cast<float>(bits); }
inline unsigned int __float_as_uint(float value) { return std::bit_cast<unsigned int>(value); }
// The compiler is told not to join them (-ffp-contract=off).
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

namespace cuda_on_cpu {

constexpr unsigned int kWarpSize = 32;

struct Warp {
  std::barrier<> meeting{kWarpSize};
  uint64_t value[kWarpSize];
};

inline std::vector<std::unique_ptr<Warp>> warps;
inline std::unique_ptr<std::barrier<>> block;

// Runs a kernel; block must be whole warps.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), unsigned int grid_x, unsigned int grid_y, unsigned int threads, Parameters... parameters) {
  blockDim = {threads, 1}, gridDim = {grid_x, grid_y};
  block = std::make_unique<std::barrier<>>(threads);
  warps.clear();
  for (unsigned int w = 0; w < threads / kWarpSize; ++w) warps.push_back(std::make_unique<Warp>());
  std::vector<std::jthread> team;
  for (unsigned int t = 0; t < threads; ++t)
    team.emplace_back([=] {
      threadIdx = {t, 0};
      for (unsigned int y = 0; y < grid_y; ++y)
        for (unsigned int x = 0; x < grid_x; ++x) {
          blockIdx = {x, y};
          kernel(parameters...);
          block->arrive_and_wait();
        }
    });
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::block->arrive_and_wait(); }

template <typename T>
T __shfl_sync(unsigned int, T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  cuda_on_cpu::Warp& warp = *cuda_on_cpu::warps[threadIdx.x / cuda_on_cpu::kWarpSize];
  std::memcpy(&warp.value[threadIdx.x % cuda_on_cpu::kWarpSize], &value, sizeof(T));
  warp.meeting.arrive_and_wait();
  std::memcpy(&value, &warp.value[from], sizeof(T));
  warp.meeting.arrive_and_wait();
  return value;
}
