// The dense half of a decoder layer over the rows of a step: norm, projections, rotation, paged attention, output projection,
// residual, the next norm and, where the layer has one, the router in one call; and linear layers.
//
// All matrices are packed (packed.h), bf16; sums are float32. A row's result does not depend on the rows beside it, but for its attention,
// which is rounded otherwise where at least kFewest rows of a sequence attend together.

#include "packed.h"

#include <math.h>

#include <cmath>
#include <mutex>
#include <vector>

#include "dense.h"
#include "router.h"
#include "team.h"

namespace {

constexpr int64_t kMostShared = 16;  // query heads of a KV head
constexpr int64_t kQueries = 64;     // rows of a sequence that attend together, at most
constexpr int64_t kFewest = 16;      // and at least: fewer attend one by one
constexpr int64_t kKeys = 128;       // keys that they attend to at a time

enum QkNorm { kNone = 0, kEachHead = 1, kAllHeads = 2 };

}  // namespace

namespace {

// What a query head has attended to so far: values weighed, their weights' sum, the largest score.
struct Attended {
  float *sum, total, most;
};

// What a thread needs to let rows attend: by themselves, or together.
struct Room {
  std::vector<Attended> heads;

  uint16_t *query, *keys, *values, *weights;
  float *sum, *most, *total;

  void make(int64_t heads, int64_t size) {
    const int64_t sums = heads * kQueries * size;
    query = halves.get(sums + 2 * kKeys * size + kQueries * kKeys);
    keys = query + sums;
    values = keys + kKeys * size;
    weights = values + kKeys * size;
    sum = reinterpret_cast<float*>(floats.get(2 * (sums + 2 * heads * kQueries)));
    most = sum + sums;
    total = most + heads * kQueries;
  }

  float* row_sums(int64_t elements) { return reinterpret_cast<float*>(floats.get(2 * elements)); }

  Scratch halves, floats;
};

#define PASSES "dense_passes.h"
#include "every_isa.h"

struct Passes {
  decltype(&anywhere::gather_rows) gather_rows;
  decltype(&anywhere::normalise_row) normalise_row;
  decltype(&anywhere::linear_panel) linear_panel;
  decltype(&anywhere::finish_row) finish_row;
  decltype(&anywhere::attend_row) attend_row;
  decltype(&anywhere::attend_rows) attend_rows;
};

#define PASSES_OF(isa) {isa::gather_rows, isa::normalise_row, isa::linear_panel, isa::finish_row, isa::attend_row, isa::attend_rows}

Passes passes_of(int isa) {
#if defined(__x86_64__)
  if (isa == kAmx) return PASSES_OF(amx);
  if (isa == kAvx512) return PASSES_OF(avx512);
  if (isa == kAvx2) return PASSES_OF(avx2);
#endif
  return PASSES_OF(anywhere);
}

// Memory of the one call that computes at a time. Never freed: a thread may compute while the process ends.
std::mutex& turn = *new std::mutex;
Scratch &row_scratch = *new Scratch, &qkv_scratch = *new Scratch;

struct Linear {
  const uint16_t *w, *bias, *residual;
  int64_t ins, outs;
  uint16_t* to;
};

// Adds the phase of a linear layer; blocks: its input.
void add_linear(Team& team, const Passes& passes, const Linear& linear, int64_t rows, const uint16_t* blocks) {
  const int64_t panels = linear.outs / 32, groups = (rows + kGroup - 1) / kGroup;
  team.phase(panels * groups, 16, [=, &passes](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / panels * kGroup;
      passes.linear_panel(blocks, first, std::min(kGroup, rows - first), linear.w, linear.ins / kDepth, linear.bias, linear.residual,
                          linear.to, linear.outs, task % panels);
    }
  });
}

// Neighbouring rows of one sequence that attend together.
struct Run {
  int64_t row, rows;
};

// Cuts a step's rows into runs: of one row each where few belong together, or the heads are of a size that has no packed form.
std::vector<Run> runs_of(const Layer& layer, const Step& step) {
  std::vector<Run> runs;
  for (int64_t row = 0; row < step.rows;) {
    int64_t end = row + 1;
    while (end < step.rows && step.sequence_T[end] == step.sequence_T[row] && step.length_T[end] == step.length_T[end - 1] + 1) ++end;
    const bool is_together = end - row >= kFewest && layer.head_size % kDepth == 0;
    for (; row < end; row = runs.back().row + runs.back().rows) runs.push_back({row, is_together ? std::min(kQueries, end - row) : 1});
  }
  return runs;
}

// Attention of runs and KV heads, counted run by run, from task `begin` to `end`.
void attend(const Layer& layer, const Step& step, const Passes& passes, const std::vector<Run>& runs, int64_t begin, int64_t end) {
  static thread_local Room room;
  for (int64_t groups = layer.kv_heads; begin < end;) {
    const Run& run = runs[begin / groups];
    const int64_t group = begin % groups, end_group = std::min(groups, group + end - begin);
    if (run.rows == 1)
      passes.attend_row(layer, step, run.row, group, end_group, room);
    else
      for (int64_t one = group; one < end_group; ++one) passes.attend_rows(layer, step, run.row, run.rows, one, room);
    begin += end_group - group;
  }
}

// Behind the norm: blocks hold its output.
void add_router(Team& team, const Passes& passes, const Router& router, const Layer& layer, const Step& step, const uint16_t* blocks) {
  add_linear(team, passes, {router.weight, router.bias, nullptr, layer.hidden, router.outs, step.scores}, step.rows, blocks);
  team.phase(step.rows, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row)
      choose_experts(step.scores + row * router.outs, router.experts, router.top_k, router.normalise, router.rounded,
                     step.ids + row * router.top_k, step.weights + row * router.top_k);
  });
}

void run_layer(const Layer& layer, const Step& step, const Passes& passes, Team& team, const std::vector<Run>& runs, uint16_t* blocks, uint16_t* qkv) {
  const int64_t rows = step.rows, inner = layer.heads * layer.head_size, wide = inner + 2 * layer.kv_heads * layer.head_size;
  team.phase(rows, 16, [&](int64_t begin, int64_t end, int) {
    passes.gather_rows(step.x, begin, end, layer.hidden, layer.norm, layer.eps, blocks);
  });
  add_linear(team, passes, {layer.qkv, layer.qkv_bias, nullptr, layer.hidden, wide, qkv}, rows, blocks);
  team.phase(rows, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) passes.finish_row(layer, step, row, qkv + row * wide);
  });
  team.phase(static_cast<int64_t>(runs.size()) * layer.kv_heads, layer.kv_heads,
             [&](int64_t begin, int64_t end, int) { attend(layer, step, passes, runs, begin, end); });
  team.phase(rows, 16, [&](int64_t begin, int64_t end, int) {
    passes.gather_rows(step.attended, begin, end, inner, nullptr, 0, blocks);
  });
  add_linear(team, passes, {layer.out, layer.out_bias, step.x, inner, layer.hidden, step.residual}, rows, blocks);
  team.phase(rows, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row)
      passes.normalise_row(step.residual + row * layer.hidden, layer.hidden, layer.next_norm, layer.next_eps, step.normed + row * layer.hidden);
    if (layer.router) passes.gather_rows(step.normed, begin, end, layer.hidden, nullptr, 0, blocks);
  });
  if (layer.router) add_router(team, passes, *layer.router, layer, step, blocks);
  team.run();
}

int64_t padded(int64_t rows) { return (rows + kRows - 1) / kRows * kRows; }

}  // namespace

extern "C" void dense_layer(const Layer* layer, const Step* step, int isa, int threads) {
  const std::lock_guard<std::mutex> my_turn(turn);
  const Passes passes = passes_of(isa);
  const int64_t inner = layer->heads * layer->head_size;
  uint16_t* blocks = row_scratch.get(padded(step->rows) * std::max(layer->hidden, inner));
  uint16_t* qkv = qkv_scratch.get(step->rows * (inner + 2 * layer->kv_heads * layer->head_size));
  const std::vector<Run> runs = runs_of(*layer, *step);
  Team team(threads, isa == kAmx);
  run_layer(*layer, *step, passes, team, runs, blocks, qkv);
}

// to[rows][outs] = x[rows][ins] . w + bias
extern "C" void dense_linear(const uint16_t* x, int64_t rows, int64_t ins, const uint16_t* w, const uint16_t* bias, int64_t outs,
                             uint16_t* to, int isa, int threads) {
  const std::lock_guard<std::mutex> my_turn(turn);
  const Passes passes = passes_of(isa);
  uint16_t* blocks = row_scratch.get(padded(rows) * ins);
  Team team(threads, isa == kAmx);
  team.phase(rows, 16, [&](int64_t begin, int64_t end, int) { passes.gather_rows(x, begin, end, ins, nullptr, 0, blocks); });
  add_linear(team, passes, {w, bias, nullptr, ins, outs, to}, rows, blocks);
  team.run();
}
