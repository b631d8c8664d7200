// Packets on a stream socket, as cluster/packets.py and kernels/dispatch.py lay them out; a test holds them to one another.

#pragma once

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>

#include "halves.h"
#include "memory.h"

namespace {

constexpr uint32_t kMagic = 0x31584D45;
constexpr uint8_t kDispatch = 1, kCombine = 2;
constexpr uint8_t kFloat32 = 0, kBfloat16 = 1;
constexpr int64_t kPairBytes = 12;
constexpr uint16_t kInMemory = 2;  // of the flags; the other is not for compiled code

#pragma pack(push, 1)
struct Header {
  uint32_t magic;
  uint8_t kind, dtype;
  uint16_t flags;
  uint32_t generation;
  uint64_t sequence, epoch;
  uint32_t layer, rows, pairs, hidden;
  uint64_t payload_bytes;
  uint8_t padding[12];
};
#pragma pack(pop)
static_assert(sizeof(Header) == 64, "a header has 64 bytes");

constexpr int64_t kHeader = sizeof(Header);

inline int64_t bytes_of(uint8_t dtype) { return dtype == kBfloat16 ? 2 : 4; }

// Reads until at least `least` of `room` bytes are there; returns how many are. Fewer than least: the peer ended (errno 0), or errno.
int64_t read_at_least(int fd, uint8_t* to, int64_t least, int64_t room) {
  int64_t got = 0;
  while (got < least) {
    const ssize_t part = recv(fd, to + got, room - got, 0);
    if (part > 0) {
      got += part;
    } else if (part == 0) {
      errno = 0;
      break;
    } else if (errno != EINTR) {
      break;
    }
  }
  return got;
}

// Sends all; false: errno, or 0 where the deadline passed with a part of it sent.
bool send_all(int fd, const uint8_t* from, int64_t size) {
  for (;;) {
    const ssize_t sent = send(fd, from, size, MSG_NOSIGNAL);
    if (sent == size) return true;
    if (sent < 0 && errno == EINTR) continue;
    if (sent >= 0) errno = 0;
    return false;
  }
}

// Sends a message that lies behind its header's place, or its header alone where the payload is in memory; false: as send_all.
bool send_message(int fd, uint8_t* message, Header header, const Memory& memory, bool is_in_memory) {
  header.flags |= is_in_memory ? kInMemory : 0;
  memcpy(message, &header, kHeader);
  if (!is_in_memory) return send_all(fd, message, kHeader + static_cast<int64_t>(header.payload_bytes));
  count_written(memory);
  return send_all(fd, message, kHeader);
}

// Writes rows to a payload, as bf16.
CLONED void round_all(const float* from, int64_t size, uint8_t* to) {
  for (int64_t at = 0; at < size; ++at) {
    const uint16_t half = to_bf16(from[at]);
    memcpy(to + at * 2, &half, 2);
  }
}

}  // namespace
