// What the kernels over packed bf16 weights have in common.
//
// Packed weights: blocks of 16 outputs by 32 inputs, of 1 KiB: block[pair of inputs 0..15][output 0..15][2]. A block is the right
// operand of an AMX tile product and 16 registers of AVX-512 as it lies in memory. A panel is the blocks of 32 outputs: two blocks
// for the first 32 inputs, two for the next ... It is read from memory as one stream.
// Rows are gathered into blocks of 16 rows by 32 inputs ([row][input]), the left operand.

#pragma once

#include <algorithm>

#include "isa.h"

namespace {

constexpr int64_t kRows = 16;    // rows of a block
constexpr int64_t kDepth = 32;   // inputs of a block
constexpr int64_t kOuts = 16;    // outputs of a block
constexpr int64_t kBlock = 512;  // elements of a block
constexpr int64_t kAhead = 8;    // blocks between what is computed and what is asked of memory
constexpr int64_t kSlab = 8;     // blocks of inputs that are used for all rows of a group at a time
constexpr int64_t kGroup = 128;  // rows that are computed together, at most: they stay in the second-level cache

// Palette 1, all eight tiles of 16 rows of 64 bytes. Constant data: the compiler does not see that ldtilecfg reads all of it.
alignas(64) const uint8_t kTileConfig[64] = {1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,               // palette, reserved
                                             64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,       // bytes a row
                                             0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,               // unused tiles
                                             16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0};      // rows

#if defined(__x86_64__)
__attribute__((target("amx-tile"))) void configure_tiles() { _tile_loadconfig(kTileConfig); }
__attribute__((target("amx-tile"))) void release_tiles() { _tile_release(); }
#else
void configure_tiles() {}
void release_tiles() {}
#endif

// Memory kept from one call to the next: fresh pages would be cleared by the kernel each time.
struct Scratch {
  uint16_t* data = nullptr;
  int64_t size = 0;
  uint16_t* get(int64_t elements) {
    if (elements > size) {
      free(data);
      size = elements + elements / 4;
      data = static_cast<uint16_t*>(aligned_alloc(64, (size * 2 + 63) / 64 * 64));
    }
    return data;
  }
  ~Scratch() { free(data); }
};

}  // namespace
