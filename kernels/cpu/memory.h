// Memory that the two ends of a link share, as actors/links/shared.py lays it out: one payload a direction at most.

#pragma once

#include <stdint.h>

// Where a link's payloads may lie; null where it shares no memory.
struct Memory {
  uint8_t* outgoing;
  uint8_t* incoming;
  int64_t room;
};

namespace {

constexpr int64_t kFront = 4096, kReleased = 64, kLeastInMemory = 4096;

inline uint64_t* written_of(uint8_t* memory) { return reinterpret_cast<uint64_t*>(memory); }
inline uint64_t* released_of(uint8_t* memory) { return reinterpret_cast<uint64_t*>(memory + kReleased); }

// Where a payload is to be written; null: it has to go over the socket.
inline uint8_t* room_for(const Memory& memory, int64_t payload_bytes) {
  if (!memory.outgoing || payload_bytes < kLeastInMemory || payload_bytes > memory.room) return nullptr;
  const bool is_free = *written_of(memory.outgoing) == __atomic_load_n(released_of(memory.outgoing), __ATOMIC_ACQUIRE);
  return is_free ? memory.outgoing + kFront : nullptr;
}

// Of the payload that was written to room_for.
inline void count_written(const Memory& memory) {
  __atomic_store_n(written_of(memory.outgoing), *written_of(memory.outgoing) + 1, __ATOMIC_RELEASE);
}

// Lets the other end write its next payload: this one, the only one under way, was read.
inline void release(const Memory& memory) {
  __atomic_store_n(released_of(memory.incoming), *released_of(memory.incoming) + 1, __ATOMIC_RELEASE);
}

}  // namespace
