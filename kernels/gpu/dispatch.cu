// Rows gathered for packets, and rows of answers added up, on a GPU. Compiled by CuPy (kernels/gpu/dispatch.py has the shapes of the
// launches), by nvcc, and for the tests by a C++ compiler that runs a block's threads as its own.
//
// All work on vectors of 16 bytes: rows begin at multiples of 16 bytes and have a multiple of 16. A sum adds its terms one after
// another, each product and each sum rounded, whichever kernel computes it: a token's result does not depend on its batch.
//
// T tokens, K choices a token, V vectors a row.

typedef unsigned short Bfloat16;  // its bits

struct alignas(16) Vector {
  unsigned int word[4];
};

constexpr int kWarp = 32, kWarps = 8, kUnrolled = 4;
constexpr unsigned int kAll = 0xffffffffu;

__device__ inline float to_float(Bfloat16 half) { return __uint_as_float(static_cast<unsigned int>(half) << 16); }

// To the nearest, ties to even; a NaN stays one.
__device__ inline Bfloat16 to_bf16(float value) {
  const unsigned int bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<Bfloat16>(bits >> 16 | 0x40u);
  return static_cast<Bfloat16>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// The elements of a vector, as floats.
template <typename T>
struct Elements;

template <>
struct Elements<float> {
  static constexpr int kCount = 4;
  __device__ static void read(const Vector& from, float* to) {
    for (int i = 0; i < 4; ++i) to[i] = __uint_as_float(from.word[i]);
  }
  __device__ static Vector write(const float* from) {
    Vector to;
    for (int i = 0; i < 4; ++i) to.word[i] = __float_as_uint(from[i]);
    return to;
  }
};

template <>
struct Elements<Bfloat16> {
  static constexpr int kCount = 8;
  __device__ static void read(const Vector& from, float* to) {
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = to_float(static_cast<Bfloat16>(from.word[i] & 0xffffu));
      to[2 * i + 1] = to_float(static_cast<Bfloat16>(from.word[i] >> 16));
    }
  }
  __device__ static Vector write(const float* from) {
    Vector to;
    for (int i = 0; i < 4; ++i) to.word[i] = to_bf16(from[2 * i]) | static_cast<unsigned int>(to_bf16(from[2 * i + 1])) << 16;
    return to;
  }
};

// The sums of a launch: of `choices` rows of `vectors` vectors of T each, on top of base_TH unless it is null, as Out.
template <typename T, typename Out>
struct Sums {
  const long long* address_TK;
  const float* weight_TK;
  const float* base_TH;
  Vector* out;
  int choices, vectors;

  static constexpr int kCount = Elements<T>::kCount, kWritten = Elements<Out>::kCount;

  __device__ void begin(long long token, int vector, float* sum) const {
    const long long at = (token * vectors + vector) * kCount;
    for (int i = 0; i < kCount; ++i) sum[i] = base_TH && vector < vectors ? base_TH[at + i] : 0.0f;
  }

  __device__ void end(long long token, int vector, const float* sum) const {
    if (vector >= vectors) return;
    // A vector of rows makes one of sums, or two where these are wider. Rows are never wider than their sums.
    for (int part = 0; part < kCount / kWritten; ++part)
      out[(token * vectors + vector) * (kCount / kWritten) + part] = Elements<Out>::write(sum + part * kWritten);
  }
};

// What a choice contributes: its row, null where it has none, times its weight.
struct Term {
  const Vector* row;
  float weight;
};

template <typename T, typename Out>
__device__ inline Term term_of(const Sums<T, Out>& all, long long token, int choice) {
  const long long at = token * all.choices + choice;
  return {reinterpret_cast<const Vector*>(all.address_TK[at]), all.weight_TK ? all.weight_TK[at] : 1.0f};
}

template <typename T>
__device__ inline void add(const Vector& from, float weight, float* sum) {
  float value[Elements<T>::kCount];
  Elements<T>::read(from, value);
  for (int i = 0; i < Elements<T>::kCount; ++i) sum[i] = __fadd_rn(sum[i], __fmul_rn(value[i], weight));
}

// Makes a token's sums, one vector of rows for each lane of a warp. Lane k holds the k-th term of 32, and the warp passes it round.
template <typename T, typename Out>
__device__ inline void sum_vectors(const Sums<T, Out>& all, long long token, int vector) {
  const int lane = threadIdx.x % kWarp;
  float sum[Elements<T>::kCount];
  all.begin(token, vector, sum);
  for (int first = 0; first < all.choices; first += kWarp) {
    const int here = min(all.choices - first, kWarp);
    Term own{nullptr, 0.0f};
    if (lane < here) own = term_of(all, token, first + lane);
    for (int k = 0; k < here; k += kUnrolled) {
      Vector loaded[kUnrolled];
      float weight[kUnrolled];
      bool has_row[kUnrolled];
      // All loads are under way before the first sum.
      for (int i = 0; i < kUnrolled; ++i) {
        const int from = min(k + i, here - 1);
        const Vector* row = reinterpret_cast<const Vector*>(__shfl_sync(kAll, reinterpret_cast<long long>(own.row), from));
        weight[i] = __shfl_sync(kAll, own.weight, from);
        has_row[i] = k + i < here && row != nullptr && vector < all.vectors;
        if (has_row[i]) loaded[i] = row[vector];
      }
      for (int i = 0; i < kUnrolled; ++i)
        if (has_row[i]) add<T>(loaded[i], weight[i], sum);
    }
  }
  all.end(token, vector, sum);
}

// Few rows: one vector a thread, the grid is (vectors / threads, rows).
extern "C" __global__ void gather_small(const Vector* rows_TV, const long long* token_R, Vector* out_RV, long long, int vectors) {
  const long long row = blockIdx.y;
  // One lane reads the number for its warp.
  const long long token = __shfl_sync(kAll, threadIdx.x % kWarp == 0 ? token_R[row] : 0, 0);
  const int vector = blockIdx.x * blockDim.x + threadIdx.x;
  if (vector < vectors) out_RV[row * vectors + vector] = rows_TV[token * vectors + vector];
}

// Many rows: the grid fills the GPU once, and its warps go from row to row.
extern "C" __global__ void gather_large(const Vector* rows_TV, const long long* token_R, Vector* out_RV, long long rows, int vectors) {
  const int lane = threadIdx.x % kWarp;
  const long long warp = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  const long long warps = static_cast<long long>(gridDim.x) * blockDim.x / kWarp;
  for (long long row = warp; row < rows; row += warps) {
    const Vector* from = rows_TV + token_R[row] * vectors;
    Vector* to = out_RV + row * vectors;
    for (int first = lane; first < vectors; first += kWarp * kUnrolled) {
      Vector loaded[kUnrolled];
      for (int i = 0; i < kUnrolled; ++i)
        if (first + i * kWarp < vectors) loaded[i] = from[first + i * kWarp];
      for (int i = 0; i < kUnrolled; ++i)
        if (first + i * kWarp < vectors) to[first + i * kWarp] = loaded[i];
    }
  }
}

// Few tokens: a vector a lane, the grid is (vectors / threads, tokens).
template <typename T, typename Out>
__global__ void combine_small(const long long* address_TK, const float* weight_TK, const float* base_TH, Vector* out, long long, int choices,
                              int vectors) {
  const Sums<T, Out> all{address_TK, weight_TK, base_TH, out, choices, vectors};
  sum_vectors(all, blockIdx.y, blockIdx.x * blockDim.x + threadIdx.x);
}

// Some tokens: the warps of a block take a choice each of 32 vectors, and the first adds up what they left in shared memory. The grid
// is (vectors / 32, tokens).
template <typename T, typename Out>
__global__ void combine_medium(const long long* address_TK, const float* weight_TK, const float* base_TH, Vector* out, long long, int choices,
                               int vectors) {
  constexpr int kCount = Elements<T>::kCount;
  __shared__ float product[kWarps][kCount][kWarp];
  __shared__ bool has_row[kWarps];
  const Sums<T, Out> all{address_TK, weight_TK, base_TH, out, choices, vectors};
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const long long token = blockIdx.y;
  const int vector = blockIdx.x * kWarp + lane;
  float sum[kCount];
  if (warp == 0) all.begin(token, vector, sum);
  for (int first = 0; first < choices; first += kWarps) {
    Term term{nullptr, 0.0f};
    if (first + warp < choices) term = term_of(all, token, first + warp);
    if (lane == 0) has_row[warp] = term.row != nullptr;
    if (term.row && vector < vectors) {
      float value[kCount];
      Elements<T>::read(term.row[vector], value);
      for (int i = 0; i < kCount; ++i) product[warp][i][lane] = __fmul_rn(value[i], term.weight);
    }
    __syncthreads();
    if (warp == 0 && vector < vectors)
      for (int w = 0; w < kWarps; ++w)
        if (has_row[w])
          for (int i = 0; i < kCount; ++i) sum[i] = __fadd_rn(sum[i], product[w][i][lane]);
    __syncthreads();
  }
  if (warp == 0) all.end(token, vector, sum);
}

// Many tokens: the grid fills the GPU once, and its warps go from 32 vectors of a token to the next.
template <typename T, typename Out>
__global__ void combine_large(const long long* address_TK, const float* weight_TK, const float* base_TH, Vector* out, long long tokens,
                              int choices, int vectors) {
  const Sums<T, Out> all{address_TK, weight_TK, base_TH, out, choices, vectors};
  const long long warp = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  const long long warps = static_cast<long long>(gridDim.x) * blockDim.x / kWarp;
  const long long parts = (vectors + kWarp - 1) / kWarp;
  for (long long piece = warp; piece < tokens * parts; piece += warps)
    sum_vectors(all, piece / parts, static_cast<int>(piece % parts) * kWarp + threadIdx.x % kWarp);
}

#define INSTANTIATE_ONE(kernel, T, Out) \
  template __global__ void kernel<T, Out>(const long long*, const float*, const float*, Vector*, long long, int, int);
#define INSTANTIATE(kernel)               \
  INSTANTIATE_ONE(kernel, float, float)   \
  INSTANTIATE_ONE(kernel, Bfloat16, float) \
  INSTANTIATE_ONE(kernel, Bfloat16, Bfloat16)

INSTANTIATE(combine_small)
INSTANTIATE(combine_medium)
INSTANTIATE(combine_large)
