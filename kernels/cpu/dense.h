// A decoder layer and a step, as callers hand them to dense.cpp.

#pragma once

#include <stdint.h>

// Laid out as kernels/cpu/dense.py has it. Null: there is none.
struct Router {
  int64_t experts, outs, top_k, normalise, rounded;  // outs: the weights have as many outputs, of which the first are experts
  const uint16_t *weight, *bias;
};

struct Layer {
  int64_t hidden, heads, kv_heads, head_size, rope_size, page_size, window, qk_norm;
  float eps, qk_eps, next_eps, scale, softcap, unused;
  const uint16_t *norm, *qkv, *qkv_bias, *q_norm, *k_norm, *out, *out_bias, *next_norm;
  const float* sinks;            // [heads]
  uint16_t *keys, *values;       // [cache row][kv_heads][head_size]
  const Router* router;
};

struct Step {
  int64_t rows, most_pages;
  const uint16_t* x;             // [rows][hidden]
  const float *cos, *sin;        // [rows][rope_size]
  const int64_t* write_T;        // cache row of each row's key and value
  const int64_t* sequence_T;     // each row's place in pages
  const int64_t* length_T;       // keys that each row attends to, itself the last
  const int64_t* pages;          // [sequence][most_pages]
  uint16_t *query, *attended;    // [rows][heads][head_size]
  uint16_t *residual, *normed;   // [rows][hidden]
  uint16_t* scores;              // of the router: [rows][outs]
  int64_t* ids;                  // [rows][top_k]
  float* weights;
};
