// The instruction sets that kernels are compiled for (every_isa.h), the best last, as kernels/cpu/isa.py counts them.

#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

enum Isa { kAnywhere = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

}  // namespace
