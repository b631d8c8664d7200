// Drawing one row's token for one instruction set, see draw.cpp.

#include "vectors.h"

typedef int64_t Longs __attribute__((vector_size(128)));

INLINE Floats scores_at(const Row& row, int64_t at) {
  return row.is_half ? from_halves(static_cast<const uint16_t*>(row.scores) + at) : load(static_cast<const float*>(row.scores) + at);
}

// The score of one token; beyond the last vector tokens are taken one by one.
INLINE float score_at(const Row& row, int64_t at) {
  if (!row.is_half) return static_cast<const float*>(row.scores)[at];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(row.scores)[at]) << 16;
  float score;
  memcpy(&score, &bits, 4);
  return score;
}

// Scores from `at` on, -infinity beyond the end.
INLINE Floats scores_to_end(const Row& row, int64_t at) {
  if (at + 16 <= row.size) return scores_at(row, at);
  Floats scores = fill(-INFINITY);
  for (int64_t i = 0; at + i < row.size; ++i) scores[i] = score_at(row, at + i);
  return scores;
}

INLINE Longs weights_of(Floats scores, float best, float temperature) {
  const Floats shifted = (scores - best) / temperature;
  const Floats weights = exponential(shifted) * kOne;
  return __builtin_convertvector(shifted < -86.0f ? Floats{} : weights, Longs);
}

INLINE int64_t sum_of(Longs v) {
  int64_t sum = 0;
  for (int lane = 0; lane < 16; ++lane) sum += v[lane];
  return sum;
}

// The largest score; NaN where any is.
float find_best(const Row& row) {
  Floats most = fill(-INFINITY);
  Ints strange = {};
  for (int64_t at = 0; at < row.size; at += 16) {
    const Floats scores = scores_to_end(row, at);
    strange |= scores != scores;
    most = scores > most ? scores : most;
  }
  float best = most[0];
  for (int lane = 0; lane < 16; ++lane) {
    if (strange[lane]) return NAN;
    best = std::max(best, most[lane]);
  }
  return best;
}

// The first token that has a score which one has.
int64_t first_with(const Row& row, float score) {
  for (int64_t at = 0;; at += 16) {
    const Ints same = scores_to_end(row, at) == score;
    for (int lane = 0; lane < 16; ++lane)
      if (same[lane]) return at + lane;
  }
}

// The first token at which the running sum of weights passes uniform * total. sums: room for one of each block.
int64_t draw(const Row& row, float best, float temperature, double uniform, int64_t* sums) {
  const int64_t blocks = (row.size + kTokens - 1) / kTokens;
  int64_t total = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    Longs sum = {};
    const int64_t end = std::min((block + 1) * kTokens, row.size);
    for (int64_t at = block * kTokens; at < end; at += 16) sum += weights_of(scores_to_end(row, at), best, temperature);
    sums[block] = sum_of(sum);
    total += sums[block];
  }
  const int64_t target = static_cast<int64_t>(uniform * static_cast<double>(total));
  int64_t passed = 0, block = 0;
  while (passed + sums[block] <= target) passed += sums[block++];
  for (int64_t at = block * kTokens;; at += 16) {
    const Longs weights = weights_of(scores_to_end(row, at), best, temperature);
    for (int lane = 0; lane < 16; ++lane) {
      passed += weights[lane];
      if (passed > target) return at + lane;
    }
  }
}
