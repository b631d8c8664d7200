// The parts of a decoder layer's attention for one instruction set, see product.h and dense.cpp.

#include "product.h"

// A vector's lanes, each in the place of the one `width` away.
template <int width>
INLINE Floats crossed(Floats v) {
  Ints other;
  for (int lane = 0; lane < 16; ++lane) other[lane] = lane ^ width;
  return __builtin_shuffle(v, other);
}

INLINE float sum_of(Floats v) {
  v += crossed<8>(v);
  v += crossed<4>(v);
  v += crossed<2>(v);
  return v[0] + v[1];
}

INLINE float largest_of(Floats v) {
  v = larger(v, crossed<8>(v));
  v = larger(v, crossed<4>(v));
  v = larger(v, crossed<2>(v));
  return v[0] > v[1] ? v[0] : v[1];
}

// 1 / root mean square of `size` elements, a multiple of 16.
INLINE float inverse_rms(const uint16_t* x, int64_t size, float eps) {
  Floats squares = {};
  for (int64_t i = 0; i < size; i += 16) {
    const Floats v = from_halves(x + i);
    squares += v * v;
  }
  return 1.0f / __builtin_sqrtf(sum_of(squares) / size + eps);
}

// Rounded before the weight is multiplied and after, as transformers does.
INLINE Halves normalised(const uint16_t* x, float scale, const uint16_t* weight) {
  const Halves rounded = to_halves(from_halves(x) * scale);
  return to_halves(from_halves((const uint16_t*)&rounded) * from_halves(weight));
}

// Rows of `from` [row][size], normalised unless norm is null, into blocks; row 0 at blocks[0].
void gather_rows(const uint16_t* from, int64_t begin, int64_t end, int64_t size, const uint16_t* norm, float eps, uint16_t* blocks) {
  const int64_t depth = size / kDepth;
  for (int64_t row = begin; row < end; ++row) {
    const uint16_t* x = from + row * size;
    uint16_t* to = blocks + row / kRows * depth * kBlock + row % kRows * kDepth;
    const float scale = norm ? inverse_rms(x, size, eps) : 0.0f;
    for (int64_t d = 0; d < depth; ++d, x += kDepth, to += kBlock) {
      if (norm) {
        const uint16_t* weight = norm + d * kDepth;
        *reinterpret_cast<Halves*>(to) = normalised(x, scale, weight);
        *reinterpret_cast<Halves*>(to + 16) = normalised(x + 16, scale, weight + 16);
      } else {
        memcpy(to, x, kDepth * 2);
      }
    }
  }
}

void normalise_row(const uint16_t* x, int64_t size, const uint16_t* weight, float eps, uint16_t* to) {
  const float scale = inverse_rms(x, size, eps);
  for (int64_t i = 0; i < size; i += 16) *reinterpret_cast<Halves*>(to + i) = normalised(x + i, scale, weight + i);
}

// 32 outputs of `rows` rows from row `first` on: to[row][outs] = blocks . w + bias, plus residual[row][outs] after rounding.
void linear_panel(const uint16_t* blocks, int64_t first, int64_t rows, const uint16_t* w, int64_t depth, const uint16_t* bias,
                  const uint16_t* residual, uint16_t* to, int64_t outs, int64_t panel) {
  alignas(64) float sums[kGroup * 32];
  product(blocks + first / kRows * depth * kBlock, rows, w + 2 * panel * depth * kBlock, depth, sums);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t column = panel * 32 + half * 16, at = (first + row) * outs + column;
      Floats sum = load(sums + row * 32 + half * 16);
      if (bias) sum += from_halves(bias + column);
      Halves rounded = to_halves(sum);
      if (residual) rounded = to_halves(from_halves((const uint16_t*)&rounded) + from_halves(residual + at));
      *reinterpret_cast<Halves*>(to + at) = rounded;
    }
}

// Rotates the first `size` elements of a head by halves (Su et al., RoFormer): x cos + rotate_half(x) sin.
INLINE void rotate(uint16_t* head, const float* cos, const float* sin, int64_t size) {
  for (int64_t i = 0; i < size / 2; i += 16) {
    const Floats low = from_halves(head + i), high = from_halves(head + size / 2 + i);
    *reinterpret_cast<Halves*>(head + i) = to_halves(low * load(cos + i) - high * load(sin + i));
    *reinterpret_cast<Halves*>(head + size / 2 + i) = to_halves(high * load(cos + size / 2 + i) + low * load(sin + size / 2 + i));
  }
}

// One row's heads: normalised, rotated, keys and values put into the cache. qkv: [heads + 2 kv_heads][head_size].
void finish_row(const Layer& layer, const Step& step, int64_t row, uint16_t* qkv) {
  const int64_t size = layer.head_size, heads = layer.heads, groups = layer.kv_heads;
  uint16_t *q = qkv, *k = qkv + heads * size, *v = k + groups * size;
  if (layer.qk_norm == kEachHead) {
    for (int64_t head = 0; head < heads; ++head) normalise_row(q + head * size, size, layer.q_norm, layer.qk_eps, q + head * size);
    for (int64_t head = 0; head < groups; ++head) normalise_row(k + head * size, size, layer.k_norm, layer.qk_eps, k + head * size);
  } else if (layer.qk_norm == kAllHeads) {
    normalise_row(q, heads * size, layer.q_norm, layer.qk_eps, q);
    normalise_row(k, groups * size, layer.k_norm, layer.qk_eps, k);
  }
  const float *cos = step.cos + row * layer.rope_size, *sin = step.sin + row * layer.rope_size;
  for (int64_t head = 0; head < heads + groups; ++head) rotate(q + head * size, cos, sin, layer.rope_size);
  memcpy(step.query + row * heads * size, q, heads * size * 2);
  memcpy(layer.keys + step.write_T[row] * groups * size, k, groups * size * 2);
  memcpy(layer.values + step.write_T[row] * groups * size, v, groups * size * 2);
}

#include "attention_passes.h"
