// Grouped skinny bf16 matrix products: y[p][n] = sum_k x[p][k] * w[slot of p][n][k], float32 accumulation, bf16 result.
//
// Rows p are sorted by slot; counts says how many each slot has. With few rows a slot the product is bound by reading weights,
// so each weight is read once, in the layout of the checkpoint: nothing is packed at load, a slot can be written at any time.
// A row's result does not depend on the other rows.
//
// AMX: the weights are the left operand in their own layout, 16 rows of w by 32 of k a tile; x, which is small, is the right one,
// packed into pairs along k (Intel 64 and IA-32 Architectures Optimization Reference Manual, chapter on AMX). AVX-512 BF16:
// dot products along k.

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int64_t kPanel = 64;        // rows of w in a task
constexpr int64_t kTokens = 32;       // rows of x that share one reading of w
constexpr int64_t kPrefetch = 128;    // elements ahead: 256 bytes measured best of 256 to 1024

// Palette 1, all eight tiles of 16 rows of 64 bytes. Constant data: the compiler does not see that ldtilecfg reads all of it.
alignas(64) const uint8_t kTileConfig[64] = {1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,               // palette, reserved
                                             64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,       // bytes a row
                                             0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,               // unused tiles
                                             16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0};      // rows

__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) void store_column(const float* tile, int column, uint16_t* y) {
  const __m512i index = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(16));
  const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_i32gather_ps(index, tile + column, 4));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), reinterpret_cast<const __m256i&>(rounded));
}

// One panel of w for up to 32 rows of x. packed: two blocks of [k/2][16 rows] pairs.
template <bool two>
__attribute__((target("amx-tile,amx-bf16,avx512f"))) void amx_panel(
    const uint32_t* packed, const uint16_t* w, int64_t first, int64_t last, int64_t n, int64_t k, int64_t rows, uint16_t* y) {
  alignas(64) float tile[2][256];
  for (int64_t o = first; o < last; o += 16) {
    _tile_zero(0);
    if (two) _tile_zero(1);
    for (int64_t i = 0; i < k; i += 32) {
      const uint16_t* left = w + o * k + i;
      for (int r = 0; r < 16; ++r) _mm_prefetch(reinterpret_cast<const char*>(left + r * k + kPrefetch), _MM_HINT_T0);
      _tile_loadd(6, left, k * 2);
      _tile_loadd(4, packed + i * 8, 64);
      _tile_dpbf16ps(0, 6, 4);
      if (two) {
        _tile_loadd(5, packed + k * 8 + i * 8, 64);
        _tile_dpbf16ps(1, 6, 5);
      }
    }
    _tile_stored(0, tile[0], 64);
    if (two) _tile_stored(1, tile[1], 64);
    for (int64_t m = 0; m < rows; ++m) store_column(tile[m / 16], m % 16, y + m * n + o);
  }
}

void pack(const uint16_t* x, int64_t rows, int64_t k, uint32_t* packed) {
  for (int64_t block = 0; block * 16 < rows; ++block)
    for (int64_t m = 0; m < 16; ++m) {
      const int64_t row = block * 16 + m;
      uint32_t* out = packed + block * k * 8 + m;
      if (row < rows) {
        const uint16_t* in = x + row * k;
        for (int64_t i = 0; i < k / 2; ++i) memcpy(out + i * 16, in + 2 * i, 4);
      } else {
        for (int64_t i = 0; i < k / 2; ++i) out[i * 16] = 0;
      }
    }
}

template <int M>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) void dot_panel(
    const uint16_t* x, const uint16_t* w, int64_t first, int64_t last, int64_t n, int64_t k, uint16_t* y) {
  for (int64_t o = first; o < last; o += 4) {
    __m512 sum[M][4];
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < 4; ++r) sum[m][r] = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 32) {
      __m512bh left[4];
      for (int r = 0; r < 4; ++r) {
        const uint16_t* row = w + (o + r) * k + i;
        _mm_prefetch(reinterpret_cast<const char*>(row + kPrefetch), _MM_HINT_T0);
        left[r] = (__m512bh)_mm512_loadu_si512(row);
      }
      for (int m = 0; m < M; ++m) {
        const __m512bh right = (__m512bh)_mm512_loadu_si512(x + m * k + i);
        for (int r = 0; r < 4; ++r) sum[m][r] = _mm512_dpbf16_ps(sum[m][r], left[r], right);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < 4; ++r) {
        const __m128bh rounded = _mm_cvtneps_pbh(_mm_set_ss(_mm512_reduce_add_ps(sum[m][r])));
        memcpy(y + m * n + o + r, &rounded, 2);
      }
  }
}

void dot_rows(const uint16_t* x, const uint16_t* w, int64_t first, int64_t last, int64_t n, int64_t k, int64_t rows, uint16_t* y) {
  for (; rows >= 4; rows -= 4, x += 4 * k, y += 4 * n) dot_panel<4>(x, w, first, last, n, k, y);
  if (rows == 3) dot_panel<3>(x, w, first, last, n, k, y);
  if (rows == 2) dot_panel<2>(x, w, first, last, n, k, y);
  if (rows == 1) dot_panel<1>(x, w, first, last, n, k, y);
}

__attribute__((target("amx-tile"))) void configure_tiles() { _tile_loadconfig(kTileConfig); }

__attribute__((target("amx-tile"))) void release_tiles() { _tile_release(); }

}  // namespace

// x [P, k], w [slots, n, k], y [P, n]; n a multiple of 16, k of 32. blocks of at most 32 rows of one slot: block_slot, block_start,
// block_rows. scratch: num_blocks * 16 * k 32-bit words, for AMX only.
extern "C" void grouped_linear(const uint16_t* x, const uint16_t* w, uint16_t* y, int64_t n, int64_t k, int64_t num_blocks,
                               const int64_t* block_slot, const int64_t* block_start, const int64_t* block_rows,
                               uint32_t* scratch, int use_amx, int threads) {
  const int64_t panels = (n + kPanel - 1) / kPanel;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (use_amx) {
      configure_tiles();
#pragma omp for schedule(static)
      for (int64_t b = 0; b < num_blocks; ++b) pack(x + block_start[b] * k, block_rows[b], k, scratch + b * kTokens * k / 2);
    }
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < num_blocks * panels; ++task) {
      const int64_t b = task / panels, first = task % panels * kPanel, last = first + kPanel < n ? first + kPanel : n;
      const uint16_t* weights = w + block_slot[b] * n * k;
      uint16_t* out = y + block_start[b] * n;
      if (!use_amx)
        dot_rows(x + block_start[b] * k, weights, first, last, n, k, block_rows[b], out);
      else if (block_rows[b] > 16)
        amx_panel<true>(scratch + b * kTokens * k / 2, weights, first, last, n, k, block_rows[b], out);
      else
        amx_panel<false>(scratch + b * kTokens * k / 2, weights, first, last, n, k, block_rows[b], out);
    }
    if (use_amx) release_tiles();
  }
}
