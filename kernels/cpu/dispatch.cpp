// A layer's tokens packed for the shards that run their experts, in one call; and what a shard reads of such a packet.
//
// A packet's payload: the rows, then the pairs' rows, experts (int32) and weights (float32), each all together (kernels/dispatch.py).
// Blocks of pairs need not be aligned. T tokens, K choices a token, S shards, R rows and P pairs of one shard.

#include <stdint.h>
#include <string.h>

namespace {

void put(uint8_t* at, int64_t index, int32_t value) { memcpy(at + index * 4, &value, 4); }

int32_t get(const uint8_t* at, int64_t index) {
  int32_t value;
  memcpy(&value, at + index * 4, 4);
  return value;
}

}  // namespace

// Adds the tokens of each expert to load_E, and those of the tokens marked in is_decode_T to decode_E. Returns 0, or 1 and has added
// nothing: an id outside 0 to experts - 1.
extern "C" int dispatch_count(const int64_t* ids_TK, const uint8_t* is_decode_T, int64_t tokens, int64_t choices, int64_t experts,
                              int64_t* load_E, int64_t* decode_E) {
  for (int64_t at = 0; at < tokens * choices; ++at)
    if (ids_TK[at] < 0 || ids_TK[at] >= experts) return 1;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < choices; ++k) {
      const int64_t expert = ids_TK[t * choices + k];
      ++load_E[expert];
      if (is_decode_T[t]) ++decode_E[expert];
    }
  return 0;
}

// Counts each shard's rows and pairs: shard_TK names the shard of a pair, or -1.
extern "C" void dispatch_sizes(const int32_t* shard_TK, int64_t tokens, int64_t choices, int64_t shards, int64_t* rows_S, int64_t* pairs_S,
                               int64_t* last_S) {
  for (int64_t s = 0; s < shards; ++s) rows_S[s] = pairs_S[s] = 0, last_S[s] = -1;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < choices; ++k) {
      const int32_t s = shard_TK[t * choices + k];
      if (s < 0) continue;
      ++pairs_S[s];
      if (last_S[s] != t) last_S[s] = t, ++rows_S[s];
    }
}

// Writes each shard's payload, and the tokens of its rows. rows_S and pairs_S as dispatch_sizes found them; next_SI: room for 3 * shards.
extern "C" void dispatch_pack(const uint8_t* hidden_TH, int64_t row_bytes, const int64_t* ids_TK, const float* weights_TK,
                              const int32_t* shard_TK, int64_t tokens, int64_t choices, int64_t shards, const int64_t* rows_S,
                              const int64_t* pairs_S, uint8_t* const* payload_S, int64_t* const* token_SR, int64_t* next_SI) {
  int64_t *row_S = next_SI, *pair_S = next_SI + shards, *last_S = next_SI + 2 * shards;
  for (int64_t s = 0; s < shards; ++s) row_S[s] = pair_S[s] = 0, last_S[s] = -1;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < choices; ++k) {
      const int64_t at = t * choices + k;
      const int32_t s = shard_TK[at];
      if (s < 0) continue;
      if (last_S[s] != t) {
        last_S[s] = t;
        token_SR[s][row_S[s]] = t;
        memcpy(payload_S[s] + row_S[s] * row_bytes, hidden_TH + t * row_bytes, row_bytes);
        ++row_S[s];
      }
      uint8_t* block = payload_S[s] + rows_S[s] * row_bytes;
      const int64_t pair = pair_S[s]++;
      put(block, pair, static_cast<int32_t>(row_S[s] - 1));
      put(block, pairs_S[s] + pair, static_cast<int32_t>(ids_TK[at]));
      memcpy(block + (2 * pairs_S[s] + pair) * 4, weights_TK + at, 4);
    }
}

// Reads a block of pairs. Returns 0; 1: a row outside 0 to rows - 1; 2: a negative expert.
extern "C" int dispatch_read(const uint8_t* block, int64_t pairs, int64_t rows, int64_t* row_P, int64_t* expert_P, float* weight_P) {
  for (int64_t p = 0; p < pairs; ++p) {
    row_P[p] = get(block, p);
    if (row_P[p] < 0 || row_P[p] >= rows) return 1;
    expert_P[p] = get(block, pairs + p);
    if (expert_P[p] < 0) return 2;
  }
  memcpy(weight_P, block + 2 * pairs * 4, pairs * 4);
  return 0;
}

// Adds rows [R, H], bf16 or float32, to those of out_TH that token_R names.
extern "C" void dispatch_add(float* out_TH, const uint8_t* rows_RH, int is_bf16, const int64_t* token_R, int64_t rows, int64_t hidden) {
  for (int64_t r = 0; r < rows; ++r) {
    float* out = out_TH + (token_R ? token_R[r] : r) * hidden;
    if (is_bf16) {
      const uint8_t* from = rows_RH + r * hidden * 2;
      for (int64_t h = 0; h < hidden; ++h) {
        uint16_t half;
        memcpy(&half, from + h * 2, 2);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        float value;
        memcpy(&value, &bits, 4);
        out[h] += value;
      }
    } else {
      const uint8_t* from = rows_RH + r * hidden * 4;
      for (int64_t h = 0; h < hidden; ++h) {
        float value;
        memcpy(&value, from + h * 4, 4);
        out[h] += value;
      }
    }
  }
}
