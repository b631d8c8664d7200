// The two passes of expert_mlp.cpp for one instruction set, see product.h.

#include "product.h"

// value is meaningless without a gate.
INLINE Floats activate(const Activation& how, Floats gate, Floats value) {
  switch (how.kind) {
    case kSwiglu: {
      const Floats most = fill(how.limit);
      gate = smaller(most, gate);
      value = larger(-most, smaller(most, value));
      return (value + how.shift) * (gate * sigmoid(how.alpha * gate));
    }
    case kGeluTanh: {  // tanh(z) = 2 sigmoid(2 z) - 1
      const Floats inner = 1.59576912160573f * (gate + 0.044715f * gate * gate * gate);
      return gate * sigmoid(inner) * value;
    }
    default: {
      const Floats positive = gate > Floats{} ? gate : Floats{};
      return positive * positive;
    }
  }
}

// One panel of the middle for all rows of a group.
void up_panel(const Call& call, const Group& group, int64_t panel, const uint16_t* blocks, uint16_t* middle) {
  const int64_t depth = call.hidden / kDepth, mid_depth = call.width / kDepth, rows = group.end - group.begin;
  const uint16_t* bias = call.up_bias ? call.up_bias[group.slot] : nullptr;
  alignas(64) float sums[kGroup * 32];
  product(blocks + group.block * depth * kBlock, rows, call.up[group.slot] + 2 * panel * depth * kBlock, depth, sums);
  for (int64_t row = 0; row < rows; ++row) {
    Floats one = load(sums + row * 32), two = load(sums + row * 32 + 16);
    uint16_t* to = middle + (group.block + row / kRows) * mid_depth * kBlock + row % kRows * kDepth;
    if (call.has_gate) {
      if (bias) {
        one += from_halves(bias + panel * kOuts);
        two += from_halves(bias + call.width + panel * kOuts);
      }
      to += panel / 2 * kBlock + panel % 2 * kOuts;
      *reinterpret_cast<Halves*>(to) = to_halves(activate(call.activation, one, two));
    } else {
      if (bias) {
        one += from_halves(bias + panel * 32);
        two += from_halves(bias + panel * 32 + 16);
      }
      to += panel * kBlock;
      *reinterpret_cast<Halves*>(to) = to_halves(activate(call.activation, one, Floats{}));
      *reinterpret_cast<Halves*>(to + kOuts) = to_halves(activate(call.activation, two, Floats{}));
    }
  }
}

constexpr int64_t kRowsAhead = 8;

// 32 columns of the output for all rows of a group; where pairs are weighted, they are added up in sum[row - first row][0..31].
void down_panel(const Call& call, const int64_t* order, const Group& group, int64_t panel, const uint16_t* middle, float* sum, int64_t sum_stride) {
  const int64_t depth = call.width / kDepth, rows = group.end - group.begin;
  const uint16_t* bias = call.down_bias ? call.down_bias[group.slot] + panel * 32 : nullptr;
  alignas(64) float sums[kGroup * 32];
  product(middle + group.block * depth * kBlock, rows, call.down[group.slot] + 2 * panel * depth * kBlock, depth, sums);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t pair = order[group.begin + row];
    if (call.weight_P && row + kRowsAhead < rows) {  // rows of a group are not neighbours
      const float* next = sum + (call.row_P[order[group.begin + row + kRowsAhead]] - call.first_row) * sum_stride;
      __builtin_prefetch(next, 1);
      __builtin_prefetch(next + 16, 1);
    }
    Floats one = load(sums + row * 32), two = load(sums + row * 32 + 16);
    if (bias) {
      one += from_halves(bias);
      two += from_halves(bias + 16);
    }
    if (call.weight_P) {
      float* to = sum + (call.row_P[pair] - call.first_row) * sum_stride;
      const float weight = call.weight_P[pair];
      save(load(to) + one * weight, to);
      save(load(to + 16) + two * weight, to + 16);
    } else {
      float* to = call.out + pair * call.hidden + panel * 32;
      save(one, to);
      save(two, to + 16);
    }
  }
}
