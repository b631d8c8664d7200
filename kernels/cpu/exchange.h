// A layer's way to its shards and back, as callers hand it to dispatch.cpp; laid out as kernels/cpu/exchange.py has it.

#pragma once

#include <stdint.h>

#include "memory.h"

namespace {

// Of a shard in an exchange.
enum ShardState : int32_t { kNotAsked = 0, kDone = 1, kOtherAnswer = 2, kNotSent = 3, kNotReceived = 4 };

// Adds the tokens of each expert to load_E, and those of generated tokens to decode_E. Ids are those of experts.
inline void count_loads(const int64_t* ids_TK, const uint8_t* is_decode_T, int64_t tokens, int64_t choices, int64_t* load_E, int64_t* decode_E) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < choices; ++k) {
      const int64_t expert = ids_TK[t * choices + k];
      ++load_E[expert];
      decode_E[expert] += is_decode_T[t] != 0;
    }
}

}  // namespace

// One layer's way to the shards and back.
struct Exchange {
  const uint8_t* hidden_TH;  // dtype as on the wire, bf16 or float32
  const int64_t* ids_TK;
  const float* weights_TK;
  const int32_t* shard_TK;
  const uint8_t* residual_TH;  // bf16, what the sum is added to once it is rounded; null: nothing
  uint8_t* out_TH;           // the sum of the answers, in the order of the shards, in the wire's dtype, once all have come
  float* sum_TH;             // until then: of those that came
  const int32_t* fd_S;       // stream sockets that block, with deadlines of their own
  const Memory* memory_S;
  const uint32_t* generation_S;
  int32_t* state_S;          // State, of each shard, and why
  int32_t* errno_S;
  const uint8_t** left_S;    // kOtherAnswer, kNotReceived: what was read of the answer; valid until this thread's next exchange
  int64_t* left_bytes_S;
  int64_t tokens, choices, shards, hidden;
  uint64_t epoch, sequence;  // the packets' sequences count up from it, by shard
  int64_t sent_bytes, received_bytes;  // of payloads; set
  double pack_s, send_s, wait_s, add_s;  // set
  uint32_t layer, dtype;
  int32_t threads;
};
