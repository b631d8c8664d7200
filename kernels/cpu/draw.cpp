// Drawing tokens from scores, row by row, as kernels/sampling.py says, for rows without a filter.

#include "isa.h"

#include <math.h>
#include <omp.h>

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t kTokens = 1024;        // of a block whose weights are summed together
constexpr float kOne = 1099511627776.0f;  // 2^40, the weight of the most likely token

struct Row {
  const void* scores;
  bool is_half;  // bf16, else float32
  int64_t size;
};

#define PASSES "draw_passes.h"
#include "every_isa.h"

struct Passes {
  decltype(&anywhere::find_best) find_best;
  decltype(&anywhere::first_with) first_with;
  decltype(&anywhere::draw) draw;
};

Passes passes_of(int isa) {
#if defined(__x86_64__)
  if (isa >= kAvx512) return {avx512::find_best, avx512::first_with, avx512::draw};
  if (isa == kAvx2) return {avx2::find_best, avx2::first_with, avx2::draw};
#endif
  return {anywhere::find_best, anywhere::first_with, anywhere::draw};
}

}  // namespace

// ids[row]: the most likely token where the temperature is 0, else the drawn one; 0 where the largest score, best[row], is not finite.
extern "C" void draw_rows(const void* scores, int is_half, int64_t rows, int64_t size, const float* temperature, const double* uniform,
                          int64_t* ids, float* best, int isa, int threads) {
  const Passes passes = passes_of(isa);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && rows > 1)
  for (int64_t n = 0; n < rows; ++n) {
    const Row row{static_cast<const char*>(scores) + n * size * (is_half ? 2 : 4), is_half != 0, size};
    best[n] = passes.find_best(row);
    ids[n] = 0;
    if (!std::isfinite(best[n])) continue;
    std::vector<int64_t> sums((size + kTokens - 1) / kTokens);
    ids[n] = temperature[n] > 0 ? passes.draw(row, best[n], temperature[n], uniform[n], sums.data()) : passes.first_with(row, best[n]);
  }
}
