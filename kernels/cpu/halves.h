// bf16 by one element, on any processor.

#pragma once

#include <stdint.h>
#include <string.h>

// Compiles a function for several instruction sets; the processor's own is taken when it is loaded.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define CLONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONED
#endif

namespace {

inline float to_float(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Rounds to the nearest, to even between two, as torch does.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t rounded = static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  return value != value ? 0x7FC0 : rounded;
}

}  // namespace
