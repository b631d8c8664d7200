// Vectors of 16 floats for one instruction set: included once for each, within a namespace of its own (every_isa.h).

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));

INLINE Floats fill(float value) { return value - Floats{}; }
INLINE Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
INLINE void save(Floats value, float* to) { *reinterpret_cast<Floats*>(to) = value; }
INLINE Floats low_halves(Words pairs) { return (Floats)(pairs << 16); }
INLINE Floats high_halves(Words pairs) { return (Floats)(pairs & 0xffff0000u); }

INLINE Floats from_halves(const uint16_t* from) {
  return (Floats)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16);
}

INLINE Halves to_halves(Floats value) {  // to the nearest, ties to even; no NaN is made of one
#if PRODUCT > 0
  return (Halves)_mm512_cvtneps_pbh((__m512)value);  // numbers below 2^-126 become 0
#endif
  const Words bits = (Words)value, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(value == value ? rounded : ((bits >> 16) | 0x40u), Halves);
}

// Of a and b; b where either is not a number.
INLINE Floats smaller(Floats a, Floats b) {
#if PRODUCT > 0
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

INLINE Floats larger(Floats a, Floats b) {
#if PRODUCT > 0
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// exp by 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes, expf), within two units of the last place; at most e^88.
INLINE Floats exponential(Floats x) {
  x = larger(fill(-87.0f), smaller(fill(88.0f), x));
  const Floats magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = fill(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if PRODUCT > 0
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const Ints power = ((Ints)shifted - (Ints)magic + 127) << 23;
  return p * (Floats)power;
#endif
}

INLINE Floats sigmoid(Floats x) {
  const Floats below = 1.0f + exponential(-x);
#if PRODUCT > 0
  const Floats near = (Floats)_mm512_rcp14_ps((__m512)below);  // one step of Newton's method doubles its 14 bits
  return near * (2.0f - below * near);
#else
  return 1.0f / below;
#endif
}
