// The instruction sets that kernels are compiled for (every_isa.h), the best last.

#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

enum Isa { kAnywhere = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

}  // namespace
