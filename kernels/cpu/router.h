// Which experts a row goes to, and how much of each: softmax over all experts' scores in float32, then the largest.

#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "halves.h"

namespace {

using Scored = std::pair<float, int64_t>;

// Not a number counts as largest, as in torch.
inline bool is_larger(const Scored& a, const Scored& b) { return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first; }

// Puts the `count` largest first, in falling order. Scores of bf16 are often equal: of those that are, the ones are taken that
// torch.topk takes on a CPU, which chooses between the same two library functions by the same rule.
inline void largest_first(std::vector<Scored>& scores, int64_t count) {
  const int64_t size = scores.size();
  if (count * 64 <= size) {
    std::partial_sort(scores.begin(), scores.begin() + count, scores.end(), is_larger);
  } else {
    std::nth_element(scores.begin(), scores.begin() + count - 1, scores.end(), is_larger);
    std::sort(scores.begin(), scores.begin() + count - 1, is_larger);
  }
}

// normalise: the chosen ones' weights add up to 1. rounded: they are rounded to bf16.
inline void choose_experts(const uint16_t* logits_E, int64_t experts, int64_t top_k, bool normalise, bool rounded, int64_t* ids_K, float* weights_K) {
  static thread_local std::vector<Scored> scores;
  scores.resize(experts);
  for (int64_t e = 0; e < experts; ++e) scores[e] = {to_float(logits_E[e]), e};
  largest_first(scores, top_k);
  const float most = scores[0].first;
  float sum = 0;
  for (int64_t e = 0; e < (normalise ? top_k : experts); ++e) sum += std::exp(scores[e].first - most);
  for (int64_t k = 0; k < top_k; ++k) {
    const float weight = std::exp(scores[k].first - most) / sum;
    ids_K[k] = scores[k].second;
    weights_K[k] = rounded ? to_float(to_bf16(weight)) : weight;
  }
}

}  // namespace
