// Batches of matrix products y[m][n] = sum_k x[m][k] * w(n, k) in which every element of y is computed in one order that
// depends on k alone: not on m, n, their numbers, the batch, the threads, or the width of the processor's registers.
//
// Two orders, by where w lies in memory:
//   along k (w[n][k], a linear layer's weight, a cache of keys): 16 partial sums, of the k that are equal modulo 16, each by fused
//     multiply-adds in rising k; then the halves are added, 16 to 8 to 4 to 2 to 1.
//   across k (w[k][n], a cache of values): one sum by fused multiply-adds in rising k. A zero in x leaves the sum as it was.
// Elements are float32 or bfloat16, sums float32, rounded once at the end. Compiled with -ffp-contract=fast: a product that is
// added becomes one fused multiply-add.

#include <omp.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define NARROW __attribute__((target("avx2,fma")))
#else  // elsewhere fused multiply-adds belong to every processor that torch runs on
#define NARROW
#endif
#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kPanel = 64;  // columns of y in a task

template <int lanes>
struct Vector {
  typedef float Floats __attribute__((vector_size(lanes * 4), aligned(4), may_alias));
  typedef uint32_t Words __attribute__((vector_size(lanes * 4), aligned(4), may_alias));
  typedef uint16_t Halves __attribute__((vector_size(lanes * 2), aligned(2), may_alias));
};

template <int lanes>
INLINE typename Vector<lanes>::Floats read(const float* from) {
  return *reinterpret_cast<const typename Vector<lanes>::Floats*>(from);
}

template <int lanes>
INLINE typename Vector<lanes>::Floats read(const uint16_t* from) {
  const auto halves = *reinterpret_cast<const typename Vector<lanes>::Halves*>(from);
  return (typename Vector<lanes>::Floats)(__builtin_convertvector(halves, typename Vector<lanes>::Words) << 16);
}

// 16 floats in one register.
struct Wide {
  Vector<16>::Floats all;
  template <typename T>
  INLINE Wide load(const T* from) { return {read<16>(from)}; }
  INLINE Wide fill(float value) { return {value - Vector<16>::Floats{}}; }
  inline __attribute__((always_inline)) void add(const Wide& a, const Wide& b) { all += a.all * b.all; }
  inline __attribute__((always_inline)) void save(float* to) const { *reinterpret_cast<Vector<16>::Floats*>(to) = all; }
};

// 16 floats in two registers.
struct Narrow {
  Vector<8>::Floats low, high;
  template <typename T>
  INLINE Narrow load(const T* from) { return {read<8>(from), read<8>(from + 8)}; }
  INLINE Narrow fill(float value) { return {value - Vector<8>::Floats{}, value - Vector<8>::Floats{}}; }
  inline __attribute__((always_inline)) void add(const Narrow& a, const Narrow& b) {
    low += a.low * b.low;
    high += a.high * b.high;
  }
  inline __attribute__((always_inline)) void save(float* to) const {
    *reinterpret_cast<Vector<8>::Floats*>(to) = low;
    *reinterpret_cast<Vector<8>::Floats*>(to + 8) = high;
  }
};

// The first count elements, then zeros.
template <typename Lanes, typename T>
INLINE Lanes load_some(const T* from, int64_t count) {
  T padded[kLanes] = {};
  memcpy(padded, from, count * sizeof(T));
  return Lanes::load(padded);
}

INLINE float widen(float value) { return value; }

INLINE float widen(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

INLINE void store(float value, float* to) { *to = value; }

INLINE void store(float value, uint16_t* to) {  // to the nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &value, 4);
  *to = value != value ? (bits >> 16) | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Adds the halves of 16 sums, and the halves of these, down to one.
template <typename Lanes>
INLINE void add_up(const Lanes& lanes, float& out) {
  float sums[kLanes];
  lanes.save(sums);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  out = sums[0];
}

template <typename Lanes, int N>
INLINE void add_up(const Lanes (&sums)[N], float (&out)[N]) {
  for (int n = 0; n < N; ++n) add_up(sums[n], out[n]);
}

// The same additions for four at once, in fewer instructions.
INLINE void add_up(const Wide (&sums)[4], float (&out)[4]) {
  typedef int Index __attribute__((vector_size(64)));
  const Index low{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  const Index even{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  const Index by_two{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13};
  const auto first = __builtin_shuffle(sums[0].all, sums[1].all, low) + __builtin_shuffle(sums[0].all, sums[1].all, low + 8);
  const auto last = __builtin_shuffle(sums[2].all, sums[3].all, low) + __builtin_shuffle(sums[2].all, sums[3].all, low + 8);
  const auto fours = __builtin_shuffle(first, last, even) + __builtin_shuffle(first, last, even + 4);
  const auto twos = fours + __builtin_shuffle(fours, by_two);
  for (int i = 0; i < 4; ++i) out[i] = twos[4 * i] + twos[4 * i + 1];
}

// A batch has two dimensions; strides are in elements. y is contiguous: [outer][inner][m][n].
struct Product {
  const void *x, *w;
  void* y;
  int64_t outer, inner, m, n, k;
  int64_t x_outer, x_inner, x_row, w_outer, w_inner, w_row;
};

template <typename Lanes, typename T, int M, int N>
INLINE void tile_along(const T* x, const T* w, T* y, const Product& p) {
  Lanes sums[M][N], left[M];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sums[m][n] = Lanes::fill(0);
  int64_t k = 0;
  for (; k + kLanes <= p.k; k += kLanes) {
    for (int m = 0; m < M; ++m) left[m] = Lanes::load(x + m * p.x_row + k);
    for (int n = 0; n < N; ++n) {
      const Lanes right = Lanes::load(w + n * p.w_row + k);
      for (int m = 0; m < M; ++m) sums[m][n].add(left[m], right);
    }
  }
  if (k < p.k) {
    for (int m = 0; m < M; ++m) left[m] = load_some<Lanes>(x + m * p.x_row + k, p.k - k);
    for (int n = 0; n < N; ++n) {
      const Lanes right = load_some<Lanes>(w + n * p.w_row + k, p.k - k);
      for (int m = 0; m < M; ++m) sums[m][n].add(left[m], right);
    }
  }
  for (int m = 0; m < M; ++m) {
    float row[N];
    add_up(sums[m], row);
    for (int n = 0; n < N; ++n) store(row[n], y + m * p.n + n);
  }
}

// count: columns, at most 2 * kLanes; all of them when `full`.
template <typename Lanes, typename T, int M, bool full>
INLINE void tile_across(const T* x, const T* w, T* y, int64_t count, const Product& p) {
  const int64_t in_second = full ? kLanes : count > kLanes ? count - kLanes : 0;
  Lanes sums[M][2];
  for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = Lanes::fill(0);
  for (int64_t k = 0; k < p.k; ++k) {
    const T* row = w + k * p.w_row;
    const Lanes first = full ? Lanes::load(row) : load_some<Lanes>(row, count - in_second);
    const Lanes second = full ? Lanes::load(row + kLanes) : load_some<Lanes>(row + kLanes, in_second);
    for (int m = 0; m < M; ++m) {
      const Lanes left = Lanes::fill(widen(x[m * p.x_row + k]));
      sums[m][0].add(left, first);
      sums[m][1].add(left, second);
    }
  }
  for (int m = 0; m < M; ++m) {
    float row[2 * kLanes];
    sums[m][0].save(row);
    sums[m][1].save(row + kLanes);
    for (int64_t n = 0; n < count; ++n) store(row[n], y + m * p.n + n);
  }
}

// M rows of y, and the columns of a panel.
template <typename Lanes, typename T, bool along, int M, int N>
INLINE void rows(const T* x, const T* w, T* y, int64_t columns, const Product& p) {
  int64_t n = 0;
  if (along) {
    for (; n + N <= columns; n += N) tile_along<Lanes, T, M, N>(x, w + n * p.w_row, y + n, p);
    for (; n < columns; ++n) tile_along<Lanes, T, M, 1>(x, w + n * p.w_row, y + n, p);
  } else {
    for (; n + 2 * kLanes <= columns; n += 2 * kLanes) tile_across<Lanes, T, M, true>(x, w + n, y + n, 2 * kLanes, p);
    if (n < columns) tile_across<Lanes, T, M, false>(x, w + n, y + n, columns - n, p);
  }
}

// One panel of columns of one product of the batch. R: rows and columns of a tile, as many as the registers hold.
template <typename Lanes, typename T, bool along, int R>
INLINE void panel(const Product& p, int64_t task) {
  const int64_t panels = (p.n + kPanel - 1) / kPanel, b = task / panels, first = task % panels * kPanel;
  const int64_t columns = p.n - first < kPanel ? p.n - first : kPanel;
  const T* x = static_cast<const T*>(p.x) + b / p.inner * p.x_outer + b % p.inner * p.x_inner;
  const T* w = static_cast<const T*>(p.w) + b / p.inner * p.w_outer + b % p.inner * p.w_inner + first * (along ? p.w_row : 1);
  T* y = static_cast<T*>(p.y) + b * p.m * p.n + first;
  int64_t m = 0;
  for (; m + R <= p.m; m += R) rows<Lanes, T, along, R, R>(x + m * p.x_row, w, y + m * p.n, columns, p);
  for (; m < p.m; ++m) rows<Lanes, T, along, 1, R>(x + m * p.x_row, w, y + m * p.n, columns, p);
}

using Task = void (*)(const Product&, int64_t);

template <typename T, bool along>
NARROW void narrow(const Product& p, int64_t task) { panel<Narrow, T, along, 2>(p, task); }

#if defined(__x86_64__)
template <typename T, bool along>
WIDE void wide(const Product& p, int64_t task) { panel<Wide, T, along, 4>(p, task); }

template <typename T, bool along>
Task pick(bool use_wide) { return use_wide ? wide<T, along> : narrow<T, along>; }

bool has_wide() {
  return __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

bool has_narrow() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
template <typename T, bool along>
Task pick(bool) { return narrow<T, along>; }

bool has_wide() { return false; }

bool has_narrow() { return true; }
#endif

}  // namespace

// 0 where the processor has no fused multiply-adds.
extern "C" int can_multiply() { return has_narrow(); }

// sizes: outer, inner, m, n, k. strides: outer, inner and row of x, then of w. is_bf16: elements of x, w and y are bfloat16, else
// float32. along: w lies along k. use_wide: 0 leaves the widest registers alone.
extern "C" void multiply(const void* x, const void* w, void* y, const int64_t* sizes, const int64_t* strides, int is_bf16,
                         int along, int use_wide, int threads) {
  const Product p{x,          w,          y,          sizes[0],   sizes[1],   sizes[2],  sizes[3],
                  sizes[4],   strides[0], strides[1], strides[2], strides[3], strides[4], strides[5]};
  const bool wide = use_wide && has_wide();
  const Task task = is_bf16 ? along ? pick<uint16_t, true>(wide) : pick<uint16_t, false>(wide)
                    : along ? pick<float, true>(wide)
                            : pick<float, false>(wide);
  const int64_t tasks = p.outer * p.inner * ((p.n + kPanel - 1) / kPanel);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < tasks; ++t) task(p, t);
}
