// The product of packed weights for one instruction set (every_isa.h). PRODUCT chooses it: 0 vectors of the compiler's, 1 AVX-512
// BF16 dot products, 2 AMX tiles.
//
// product(): sums[row][32] = rows . weights, over `depth` blocks, or with `more` that is added to what they are (there must be room for
// whole blocks of rows then). a: blocks of rows, those of the next 16 rows `depth` blocks behind
// those of the 16 before. w: a panel.

#include "vectors.h"

#if PRODUCT == 0
template <int half, int M>
INLINE void plain_rows(const uint16_t* a, const uint16_t* panel, int64_t depth, float* sums, bool more) {
  Floats sum[M];
  for (int m = 0; m < M; ++m) sum[m] = more ? load(sums + m * 32 + half * 16) : Floats{};
  for (int64_t d = 0; d < depth; ++d) {
    const uint16_t *w = panel + (2 * d + half) * kBlock, *x = a + d * kBlock;
    for (int pair = 0; pair < 16; ++pair) {
      const Words pairs = *reinterpret_cast<const Words*>(w + pair * 32);
      const Floats even = low_halves(pairs), odd = high_halves(pairs);
      for (int m = 0; m < M; ++m) {
        uint32_t both;
        memcpy(&both, x + m * kDepth + 2 * pair, 4);
        const uint32_t bits[2] = {both << 16, both & 0xffff0000u};
        float left[2];
        memcpy(left, bits, 8);
        sum[m] += even * left[0];
        sum[m] += odd * left[1];
      }
    }
  }
  for (int m = 0; m < M; ++m) save(sum[m], sums + m * 32 + half * 16);
}

template <int M>
INLINE void plain_pair(const uint16_t* a, const uint16_t* w, int64_t depth, float* sums, bool more) {
  plain_rows<0, M>(a, w, depth, sums, more);
  plain_rows<1, M>(a, w, depth, sums, more);
}

INLINE void product(const uint16_t* a, int64_t rows, const uint16_t* w, int64_t depth, float* sums, bool more = false) {
  for (int64_t row = 0; row < rows;) {
    const uint16_t* block = a + row / kRows * depth * kBlock + row % kRows * kDepth;
    const int64_t left = std::min(rows, (row / kRows + 1) * kRows) - row;
    float* out = sums + row * 32;
    if (left >= 4) {
      plain_pair<4>(block, w, depth, out, more);
      row += 4;
    } else {
      plain_pair<1>(block, w, depth, out, more);
      row += 1;
    }
  }
}
#elif PRODUCT == 1
// One block's products with M rows.
template <int M>
INLINE void dot_block(const uint16_t* a, const uint16_t* w, __m512* sum) {
  for (int pair = 0; pair < 16; ++pair) {
    const __m512bh right = (__m512bh)_mm512_loadu_si512(w + pair * 32);
    for (int m = 0; m < M; ++m) {
      int32_t both;
      memcpy(&both, a + m * kDepth + 2 * pair, 4);
      sum[m] = _mm512_dpbf16_ps(sum[m], (__m512bh)_mm512_set1_epi32(both), right);
    }
  }
}

// Both halves of a panel at once: M rows are 2 M sums that do not wait for each other.
template <int M>
INLINE void dot_both(const uint16_t* a, const uint16_t* w0, __m512* low, __m512* high) {
  const uint16_t* w1 = w0 + kBlock;
  for (int pair = 0; pair < 16; ++pair) {
    __builtin_prefetch(w0 + kAhead * kBlock + pair * 32, 0, 2);
    __builtin_prefetch(w1 + kAhead * kBlock + pair * 32, 0, 2);
    const __m512bh right0 = (__m512bh)_mm512_loadu_si512(w0 + pair * 32);
    const __m512bh right1 = (__m512bh)_mm512_loadu_si512(w1 + pair * 32);
    for (int m = 0; m < M; ++m) {
      int32_t both;
      memcpy(&both, a + m * kDepth + 2 * pair, 4);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(both);
      low[m] = _mm512_dpbf16_ps(low[m], left, right0);
      high[m] = _mm512_dpbf16_ps(high[m], left, right1);
    }
  }
}

// So few rows wait for memory alone: one address after another, without hints, is what the hardware itself reads ahead best.
constexpr int kReadAlone = 3;

template <int M>
INLINE void dot_rows(const uint16_t* a, const uint16_t* w, int64_t depth, float* sums, bool more) {
  __m512 low[M], high[M];
  for (int m = 0; m < M; ++m) {
    low[m] = more ? _mm512_loadu_ps(sums + m * 32) : _mm512_setzero_ps();
    high[m] = more ? _mm512_loadu_ps(sums + m * 32 + 16) : _mm512_setzero_ps();
  }
  for (int64_t d = 0; d < depth; ++d, a += kBlock, w += 2 * kBlock) {
    if constexpr (M <= kReadAlone) {
      dot_block<M>(a, w, low);
      dot_block<M>(a, w + kBlock, high);
    } else {
      dot_both<M>(a, w, low, high);
    }
  }
  for (int m = 0; m < M; ++m) {
    _mm512_storeu_ps(sums + m * 32, low[m]);
    _mm512_storeu_ps(sums + m * 32 + 16, high[m]);
  }
}

// The accumulators of 12 rows, two registers of weights and what is left for addresses: all 32 registers.
constexpr int64_t kMostRows = 12;

template <int M = kMostRows>
INLINE void dot_any(const uint16_t* a, int64_t rows, const uint16_t* w, int64_t depth, float* sums, bool more) {
  if (rows == M)
    dot_rows<M>(a, w, depth, sums, more);
  else if constexpr (M > 1)
    dot_any<M - 1>(a, rows, w, depth, sums, more);
}

INLINE void product(const uint16_t* a, int64_t rows, const uint16_t* w, int64_t depth, float* sums, bool more = false) {
  for (int64_t row = 0; row < rows;) {
    const int64_t left = std::min(rows, (row / kRows + 1) * kRows) - row, now = left <= kMostRows ? left : (left + 1) / 2;
    dot_any(a + row / kRows * depth * kBlock + row % kRows * kDepth, now, w, depth, sums + row * 32, more);
    row += now;
  }
}
#else
// Asks for so many cache lines, for the second-level cache.
INLINE void prefetch(const uint16_t*& from, int64_t lines) {
  for (int64_t line = 0; line < lines; ++line, from += 32) __builtin_prefetch(from, 0, 2);
}

// Adds `count` blocks of inputs to the sums of 16 or 32 rows; meanwhile asks for 4 * lines cache lines a block from `next`.
template <bool two>
INLINE void tile_rows(const uint16_t* a, const uint16_t* below, const uint16_t* w, int64_t count, float* sums, bool is_first,
                      const uint16_t* next, int64_t lines) {
  if (is_first) {
    _tile_zero(0);
    _tile_zero(1);
    if (two) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, sums, 128);
    _tile_loadd(1, sums + 16, 128);
    if (two) {
      _tile_loadd(2, sums + 16 * 32, 128);
      _tile_loadd(3, sums + 16 * 32 + 16, 128);
    }
  }
  for (int64_t d = 0; d < count; ++d) {
    prefetch(next, lines);
    _tile_loadd(6, w + 2 * d * kBlock, 64);
    prefetch(next, lines);
    _tile_loadd(4, a + d * kBlock, 64);
    _tile_dpbf16ps(0, 4, 6);
    prefetch(next, lines);
    _tile_loadd(7, w + (2 * d + 1) * kBlock, 64);
    _tile_dpbf16ps(1, 4, 7);
    prefetch(next, lines);
    if (two) {
      _tile_loadd(5, below + d * kBlock, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  if (two) {
    _tile_stored(2, sums + 16 * 32, 128);
    _tile_stored(3, sums + 16 * 32 + 16, 128);
  }
}

INLINE void product(const uint16_t* a, int64_t rows, const uint16_t* w, int64_t depth, float* sums, bool more = false) {
  // A slab of the panel is used for all rows before the next, which is asked of memory meanwhile; for few rows, which memory alone
  // bounds, 2 KiB ahead reads fastest.
  const int64_t passes = (rows + 2 * kRows - 1) / (2 * kRows), lines = (8 + passes - 1) / passes;
  for (int64_t d = 0; d < depth; d += kSlab) {
    const uint16_t *weights = w + 2 * d * kBlock, *next = weights + 2 * (passes == 1 ? 1 : kSlab) * kBlock;
    const int64_t count = std::min(kSlab, depth - d);
    for (int64_t row = 0; row < rows; row += 2 * kRows, next += 4 * lines * count * 32) {
      const uint16_t* block = a + (row / kRows * depth + d) * kBlock;
      if (rows - row > kRows)
        tile_rows<true>(block, block + depth * kBlock, weights, count, sums + row * 32, d == 0 && !more, next, lines);
      else
        tile_rows<false>(block, nullptr, weights, count, sums + row * 32, d == 0 && !more, next, lines);
    }
  }
}
#endif

