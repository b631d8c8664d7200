// The MLPs of many experts over the rows of a step in one call: gather, up projection, activation, down projection, weighted sum.
//
// Of the up projection's panels (packed.h) the first of two blocks is for 16 gates and the second for the values that they gate.
//
// Two phases: (expert, panel of the middle) and (panel of the output over all experts), so that no two
// threads write one place and, for up to kGroup rows an expert, each weight is read from memory once. Sums are float32 in one order for a row, whatever rows are
// computed beside it, and a row's experts are added in the order of the slots.

#include "packed.h"

#include <mutex>
#include <vector>

#include "team.h"

namespace {

constexpr int64_t kStep = 1024;  // rows computed at a time: what they need besides weights stays in the caches
constexpr int64_t kAtOnce = 16;   // panels of the output for which a thread goes through the groups, at most
constexpr int64_t kFew = 8;      // groups of a call that helpers are called for, at most
constexpr int64_t kMany = 1024;  // or pairs, at least

// Threads beside those of a call, on other processes' cores. One token's experts seldom fall evenly on the shards of a machine, and the
// busiest decides: they are called where memory is read for few experts, and where many rows are multiplied. Between the two the shares
// are more alike than the helpers' coming and going is worth.
std::atomic<int> num_helpers{0};

enum Kind { kSwiglu = 0, kGeluTanh = 1, kRelu2 = 2 };

// kSwiglu: (clamp(value) + shift) * gate * sigmoid(alpha * gate), the gate at most limit, the value within +-limit.
struct Activation {
  int kind;
  float alpha, limit, shift;
};

// Rows of one slot: rows `begin` to `end` of the sorted pairs, whose blocks begin at block `block`. At most kGroup of them, so that
// they stay in the second-level cache while one panel after another is computed for them.
struct Group {
  int64_t slot, begin, end, block;
};

// Puts the pairs of rows `first` to `end` in the order of their slots.
std::vector<Group> sort_pairs(const int64_t* slot_P, const int64_t* row_P, int64_t pairs, int64_t slots, int64_t first, int64_t end,
                              std::vector<int64_t>& order) {
  const auto is_in = [&](int64_t p) { return first <= row_P[p] && row_P[p] < end; };
  std::vector<int64_t> start(slots + 1, 0);
  for (int64_t p = 0; p < pairs; ++p)
    if (is_in(p)) ++start[slot_P[p] + 1];
  for (int64_t s = 0; s < slots; ++s) start[s + 1] += start[s];
  std::vector<Group> groups;
  int64_t block = 0;
  for (int64_t s = 0; s < slots; ++s) {
    const int64_t blocks = (start[s + 1] - start[s] + kRows - 1) / kRows, parts = (blocks * kRows + kGroup - 1) / kGroup;
    const int64_t part = parts ? (blocks + parts - 1) / parts * kRows : 1;
    for (int64_t begin = start[s]; begin < start[s + 1]; begin += part) {
      const int64_t end = std::min(begin + part, start[s + 1]);
      groups.push_back({s, begin, end, block});
      block += (end - begin + kRows - 1) / kRows;
    }
  }
  order.resize(start[slots]);
  for (int64_t p = 0; p < pairs; ++p)
    if (is_in(p)) order[start[slot_P[p]]++] = p;
  return groups;
}

struct Call {
  const uint16_t* x;        // [rows][hidden]
  const int64_t* row_P;
  const float* weight_P;    // null: the pairs are not weighted and not added up
  const uint16_t* const* up;    // packed, by slot
  const uint16_t* const* down;
  const uint16_t* const* up_bias;  // by slot, bf16, gates before values; null: none
  const uint16_t* const* down_bias;
  float* out;               // [rows][hidden], or [pairs][hidden]
  int64_t hidden, width;
  bool has_gate;
  Activation activation;
  int64_t first_row;        // of those that are computed now
};

INLINE void gather(const Call& call, const std::vector<int64_t>& order, const Group& group, uint16_t* blocks) {
  const int64_t depth = call.hidden / kDepth;
  for (int64_t at = group.begin; at < group.end; ++at) {
    const int64_t row = at - group.begin;
    const uint16_t* from = call.x + call.row_P[order[at]] * call.hidden;
    uint16_t* to = blocks + (group.block + row / kRows) * depth * kBlock + row % kRows * kDepth;
    for (int64_t d = 0; d < depth; ++d) memcpy(to + d * kBlock, from + d * kDepth, kDepth * 2);
  }
}

using UpPanel = void (*)(const Call&, const Group&, int64_t panel, const uint16_t* blocks, uint16_t* middle);
using DownPanel = void (*)(const Call&, const int64_t* order, const Group&, int64_t panel, const uint16_t* middle, float* sum, int64_t sum_stride);

struct Passes {
  UpPanel up;
  DownPanel down;
};

#define PASSES "expert_passes.h"
#include "every_isa.h"

Passes passes_of(int isa) {
#if defined(__x86_64__)
  if (isa == kAmx) return {amx::up_panel, amx::down_panel};
  if (isa == kAvx512) return {avx512::up_panel, avx512::down_panel};
  if (isa == kAvx2) return {avx2::up_panel, avx2::down_panel};
#endif
  return {anywhere::up_panel, anywhere::down_panel};
}

// Computes the pairs of the `rows` rows from call.first_row on.
void run(const Call& call, int isa, const int64_t* slot_P, int64_t rows, int64_t pairs, int64_t slots, int threads) {
  const Passes passes = passes_of(isa);
  // One call at a time has all cores; others wait, and share its memory. Never freed: a thread may compute while the process ends.
  static std::mutex& turn = *new std::mutex;
  static Scratch &row_scratch = *new Scratch, &middle_scratch = *new Scratch, &sum_scratch = *new Scratch;
  const std::lock_guard<std::mutex> my_turn(turn);
  std::vector<int64_t> order;
  const std::vector<Group> groups = sort_pairs(slot_P, call.row_P, pairs, slots, call.first_row, call.first_row + rows, order);
  const int64_t own_pairs = order.size();
  if (static_cast<int64_t>(groups.size()) <= kFew || own_pairs >= kMany) threads += num_helpers;
  const int64_t num_groups = groups.size(), up_panels = call.width / (call.has_gate ? kOuts : 32);
  const int64_t down_panels = call.hidden / 32;
  int64_t num_blocks = 0;
  for (const Group& group : groups) num_blocks += (group.end - group.begin + kRows - 1) / kRows;
  const int64_t at_once = std::clamp<int64_t>(down_panels / (2 * threads), 1, kAtOnce);
  uint16_t* blocks = row_scratch.get(num_blocks * kRows * call.hidden);
  uint16_t* middle = middle_scratch.get(num_blocks * kRows * call.width);
  float* sums = reinterpret_cast<float*>(sum_scratch.get(call.weight_P ? threads * rows * at_once * 64 : 0));
  Team team(threads, isa == kAmx);
  team.phase(num_groups, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t g = begin; g < end; ++g) gather(call, order, groups[g], blocks);
  });
  team.phase(num_groups * up_panels, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; ++task) passes.up(call, groups[task / up_panels], task % up_panels, blocks, middle);
  });
  team.phase((down_panels + at_once - 1) / at_once, 1, [&](int64_t begin, int64_t end, int thread) {
    float* sum = sums + thread * rows * at_once * 32;
    for (int64_t first = begin * at_once; first < std::min(end * at_once, down_panels); first += at_once) {
      const int64_t count = std::min(at_once, down_panels - first);
      if (call.weight_P) memset(sum, 0, rows * at_once * 128);
      for (const Group& group : groups)
        for (int64_t at = 0; at < count; ++at) passes.down(call, order.data(), group, first + at, middle, sum + at * 32, at_once * 32);
      if (call.weight_P)
        for (int64_t row = 0; row < rows; ++row)
          memcpy(call.out + (call.first_row + row) * call.hidden + first * 32, sum + row * at_once * 32, count * 128);
    }
  });
  team.run();
}

}  // namespace

// Packs w [outs, ins], whose element (o, i) is at o * out_stride + i * in_stride: every half_step-th half of a panel of `to`, from
// half `half`. outs a multiple of 16, ins of 32.
extern "C" void expert_pack(
    const uint16_t* w, int64_t out_stride, int64_t in_stride, int64_t outs, int64_t ins, int64_t half, int64_t half_step, uint16_t* to) {
  for (int64_t o = 0; o < outs; o += kOuts, half += half_step)
    for (int64_t i = 0; i < ins; i += kDepth) {
      uint16_t* block = to + half / 2 * 2 * ins * kOuts + (i / kDepth * 2 + half % 2) * kBlock;
      for (int64_t out = 0; out < kOuts; ++out) {
        const uint16_t* from = w + (o + out) * out_stride + i * in_stride;
        if (in_stride == 1)
          for (int64_t pair = 0; pair < 16; ++pair) memcpy(block + pair * 32 + out * 2, from + 2 * pair, 4);
        else
          for (int64_t in = 0; in < kDepth; ++in) block[in / 2 * 32 + out * 2 + in % 2] = from[in * in_stride];
      }
    }
}

// The inverse of expert_pack.
extern "C" void expert_unpack(
    const uint16_t* from, int64_t half, int64_t half_step, uint16_t* w, int64_t out_stride, int64_t in_stride, int64_t outs, int64_t ins) {
  for (int64_t o = 0; o < outs; o += kOuts, half += half_step)
    for (int64_t i = 0; i < ins; i += kDepth) {
      const uint16_t* block = from + half / 2 * 2 * ins * kOuts + (i / kDepth * 2 + half % 2) * kBlock;
      for (int64_t out = 0; out < kOuts; ++out) {
        uint16_t* to = w + (o + out) * out_stride + i * in_stride;
        if (in_stride == 1)
          for (int64_t pair = 0; pair < 16; ++pair) memcpy(to + 2 * pair, block + pair * 32 + out * 2, 4);
        else
          for (int64_t in = 0; in < kDepth; ++in) to[in * in_stride] = block[in / 2 * 32 + out * 2 + in % 2];
      }
    }
}

// sizes: rows, pairs, slots, hidden, width. pointers by slot: packed up and down, then biases or null.
extern "C" void expert_mlp(const uint16_t* x, const int64_t* row_P, const int64_t* slot_P, const float* weight_P,
                           const uint16_t* const* up, const uint16_t* const* down, const uint16_t* const* up_bias,
                           const uint16_t* const* down_bias, float* out, const int64_t* sizes, int has_gate, int kind,
                           float alpha, float limit, float shift, int isa, int threads) {
  Call call{x, row_P, weight_P, up, down, up_bias, down_bias, out, sizes[3], sizes[4], has_gate != 0, {kind, alpha, limit, shift}, 0};
  for (; call.first_row < sizes[0]; call.first_row += kStep)
    run(call, isa, slot_P, std::min(kStep, sizes[0] - call.first_row), sizes[1], sizes[2], threads);
}

// Starts `helpers` threads beside those of a call's own, on the cores that the calling thread may use.
extern "C" void expert_mlp_start(int threads, int helpers) {
  Helpers::all().start(threads - 1 + helpers);
  num_helpers = helpers;
}
