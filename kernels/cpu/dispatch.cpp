// A layer's dispatch: tokens packed for the shards that run their experts, sent, the answers received and added.
//
// A packet's payload: the rows, then the pairs' rows, experts (int32) and weights (float32), each all together (kernels/dispatch.py).
// Blocks of pairs need not be aligned. T tokens, K choices a token, S shards, R rows and P pairs of one shard.

#include <algorithm>
#include <vector>

#include "exchange.h"
#include "packets.h"
#include "seconds.h"
#include "team.h"

namespace {

constexpr int64_t kWorthThreads = 1 << 19;  // bytes of rows: below, waking another thread costs more than it does

void put(uint8_t* at, int64_t index, int32_t value) { memcpy(at + index * 4, &value, 4); }

int32_t get(const uint8_t* at, int64_t index) {
  int32_t value;
  memcpy(&value, at + index * 4, 4);
  return value;
}

// What each shard is asked: shard_TK names the shard of a pair, or -1.
struct Requests {
  const uint8_t* hidden_TH;
  int64_t row_bytes;
  const int64_t* ids_TK;
  const float* weights_TK;
  const int32_t* shard_TK;
  int64_t tokens, choices, shards;
};

void count(const Requests& all, int64_t* rows_S, int64_t* pairs_S) {
  std::vector<int64_t> last_S(all.shards, -1);
  for (int64_t s = 0; s < all.shards; ++s) rows_S[s] = pairs_S[s] = 0;
  for (int64_t t = 0; t < all.tokens; ++t)
    for (int64_t k = 0; k < all.choices; ++k) {
      const int32_t s = all.shard_TK[t * all.choices + k];
      if (s < 0) continue;
      ++pairs_S[s];
      if (last_S[s] != t) last_S[s] = t, ++rows_S[s];
    }
}

// Writes a shard's payload, and the tokens of its rows; rows and pairs as counted.
void pack(const Requests& all, int32_t shard, int64_t rows, int64_t pairs, uint8_t* payload, int64_t* token_R) {
  uint8_t* block = payload + rows * all.row_bytes;
  int64_t row = -1, pair = 0, last = -1;
  for (int64_t t = 0; t < all.tokens; ++t)
    for (int64_t k = 0; k < all.choices; ++k) {
      const int64_t at = t * all.choices + k;
      if (all.shard_TK[at] != shard) continue;
      if (last != t) {
        last = t;
        token_R[++row] = t;
        memcpy(payload + row * all.row_bytes, all.hidden_TH + t * all.row_bytes, all.row_bytes);
      }
      put(block, pair, static_cast<int32_t>(row));
      put(block, pairs + pair, static_cast<int32_t>(all.ids_TK[at]));
      memcpy(block + (2 * pairs + pair) * 4, all.weights_TK + at, 4);
      ++pair;
    }
}

CLONED void add_halves(float* sum, const uint8_t* from, int64_t size) {
  for (int64_t h = 0; h < size; ++h) {
    uint16_t half;
    memcpy(&half, from + h * 2, 2);
    sum[h] += to_float(half);
  }
}

CLONED void add_floats(float* sum, const uint8_t* from, int64_t size) {
  for (int64_t h = 0; h < size; ++h) {
    float value;
    memcpy(&value, from + h * 4, 4);
    sum[h] += value;
  }
}

// Adds rows [R, H] to those of sum_TH that token_R names; null: to the first R.
void add(float* sum_TH, const uint8_t* rows_RH, uint8_t dtype, const int64_t* token_R, int64_t rows, int64_t hidden) {
  const auto add_row = dtype == kBfloat16 ? add_halves : add_floats;
  for (int64_t r = 0; r < rows; ++r) add_row(sum_TH + (token_R ? token_R[r] : r) * hidden, rows_RH + r * hidden * bytes_of(dtype), hidden);
}

CLONED void add_residual(const uint8_t* residual, int64_t size, uint8_t* to) {
  for (int64_t h = 0; h < size; ++h) {
    uint16_t a, b;
    memcpy(&a, residual + h * 2, 2);
    memcpy(&b, to + h * 2, 2);
    b = to_bf16(to_float(a) + to_float(b));
    memcpy(to + h * 2, &b, 2);
  }
}

// A shard's answer: rows [R, H] of the tokens token_R, which rise.
struct Answer {
  const uint8_t* rows_RH;
  const int64_t* token_R;
  int64_t rows;
};

// Writes the sums of tokens begin to end to out_TH, each token's in one go while it is in the caches.
void combine(const Exchange& e, const std::vector<Answer>& answers, int64_t begin, int64_t end) {
  const int64_t row_bytes = e.hidden * bytes_of(e.dtype);
  const auto add_row = e.dtype == kBfloat16 ? add_halves : add_floats;
  static thread_local std::vector<float> sum_H;
  sum_H.resize(e.hidden);
  std::vector<int64_t> next_S;
  for (const Answer& answer : answers) next_S.push_back(std::lower_bound(answer.token_R, answer.token_R + answer.rows, begin) - answer.token_R);
  for (int64_t t = begin; t < end; ++t) {
    std::fill(sum_H.begin(), sum_H.end(), 0.0f);
    for (size_t s = 0; s < answers.size(); ++s) {
      if (next_S[s] == answers[s].rows || answers[s].token_R[next_S[s]] != t) continue;
      add_row(sum_H.data(), answers[s].rows_RH + next_S[s]++ * row_bytes, e.hidden);
    }
    uint8_t* out_H = e.out_TH + t * row_bytes;
    if (e.dtype == kBfloat16)
      round_all(sum_H.data(), e.hidden, out_H);
    else
      memcpy(out_H, sum_H.data(), row_bytes);
    if (e.residual_TH) add_residual(e.residual_TH + t * row_bytes, e.hidden, out_H);
  }
}

// Sends a shard its packet, whose payload is packed; notes what became of it.
void send_packet(Exchange& e, int64_t s, int64_t rows, int64_t pairs, uint8_t* message, bool is_in_memory) {
  const uint64_t payload_bytes = rows * e.hidden * bytes_of(e.dtype) + pairs * kPairBytes;
  const Header header{kMagic,
                      kDispatch,
                      static_cast<uint8_t>(e.dtype),
                      0,
                      e.generation_S[s],
                      e.sequence + s,
                      e.epoch,
                      e.layer,
                      static_cast<uint32_t>(rows),
                      static_cast<uint32_t>(pairs),
                      static_cast<uint32_t>(e.hidden),
                      payload_bytes,
                      {}};
  if (send_message(e.fd_S[s], message, header, e.memory_S[s], is_in_memory)) {
    e.state_S[s] = kDone;  // until the answer says otherwise
    e.sent_bytes += payload_bytes;
  } else {
    e.state_S[s] = kNotSent;
    e.errno_S[s] = errno;
  }
}

// Receives a shard's answer. Returns where its rows are, in the buffer or in the link's memory; null: it is not the answer that is
// expected, and what was read of it is noted. Nothing behind that answer is read: what else comes is for others to make sense of.
const uint8_t* take_answer(Exchange& e, int64_t s, int64_t rows, std::vector<uint8_t>& buffer) {
  const Memory& memory = e.memory_S[s];
  const int64_t answer_bytes = rows * e.hidden * bytes_of(e.dtype);
  int64_t wanted = kHeader + answer_bytes;
  buffer.resize(std::max<size_t>(buffer.size(), wanted));
  uint8_t* answer = buffer.data();
  int64_t got = read_at_least(e.fd_S[s], answer, kHeader, memory.incoming ? kHeader : wanted);
  Header header;
  memcpy(&header, answer, kHeader);
  const bool is_in_memory = memory.incoming && header.flags == kInMemory && answer_bytes <= memory.room;
  const bool is_answer = got >= kHeader && header.magic == kMagic && header.kind == kCombine && header.dtype == e.dtype &&
                         (header.flags == 0 || is_in_memory) && header.generation == e.generation_S[s] &&
                         header.sequence == e.sequence + s && header.rows == rows && header.hidden == e.hidden &&
                         header.payload_bytes == static_cast<uint64_t>(answer_bytes);
  if (is_in_memory) wanted = kHeader;
  if (is_answer && got < wanted) got += read_at_least(e.fd_S[s], answer + got, wanted - got, wanted - got);
  if (is_answer && got == wanted) {
    e.received_bytes += answer_bytes;
    return is_in_memory ? memory.incoming + kFront : answer + kHeader;
  }
  e.state_S[s] = got >= kHeader && !is_answer ? kOtherAnswer : kNotReceived;
  e.errno_S[s] = errno;
  e.left_S[s] = answer;
  e.left_bytes_S[s] = got;
  return nullptr;
}

}  // namespace

// Adds the tokens of each expert to load_E, and those of the tokens marked in is_decode_T to decode_E. Returns 0, or 1 and has added
// nothing: an id outside 0 to experts - 1.
extern "C" int dispatch_count(const int64_t* ids_TK, const uint8_t* is_decode_T, int64_t tokens, int64_t choices, int64_t experts,
                              int64_t* load_E, int64_t* decode_E) {
  for (int64_t at = 0; at < tokens * choices; ++at)
    if (ids_TK[at] < 0 || ids_TK[at] >= experts) return 1;
  count_loads(ids_TK, is_decode_T, tokens, choices, load_E, decode_E);
  return 0;
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

// See add.
extern "C" void dispatch_add(float* sum_TH, const uint8_t* rows_RH, int is_bf16, const int64_t* token_R, int64_t rows, int64_t hidden) {
  add(sum_TH, rows_RH, is_bf16 ? kBfloat16 : kFloat32, token_R, rows, hidden);
}

// See count.
extern "C" void dispatch_sizes(const int32_t* shard_TK, int64_t tokens, int64_t choices, int64_t shards, int64_t* rows_S, int64_t* pairs_S) {
  count({nullptr, 0, nullptr, nullptr, shard_TK, tokens, choices, shards}, rows_S, pairs_S);
}

// See pack; shards without pairs are left alone.
extern "C" void dispatch_pack(const uint8_t* hidden_TH, int64_t row_bytes, const int64_t* ids_TK, const float* weights_TK,
                              const int32_t* shard_TK, int64_t tokens, int64_t choices, int64_t shards, const int64_t* rows_S,
                              const int64_t* pairs_S, uint8_t* const* payload_S, int64_t* const* token_SR) {
  const Requests all{hidden_TH, row_bytes, ids_TK, weights_TK, shard_TK, tokens, choices, shards};
  for (int64_t s = 0; s < shards; ++s)
    if (pairs_S[s]) pack(all, s, rows_S[s], pairs_S[s], payload_S[s], token_SR[s]);
}

// Returns 1 when all that was asked is done. Every answer under way is waited for, whatever became of the others.
extern "C" int dispatch_exchange(Exchange* e) {
  static thread_local std::vector<std::vector<uint8_t>> message_S, answer_S;
  static thread_local std::vector<std::vector<int64_t>> token_SR;
  const int64_t shards = e->shards, row_bytes = e->hidden * bytes_of(e->dtype);
  const Requests all{e->hidden_TH, row_bytes, e->ids_TK, e->weights_TK, e->shard_TK, e->tokens, e->choices, shards};
  double mark_s = now_s();
  const auto lap_s = [&] {
    const double before_s = mark_s;
    mark_s = now_s();
    return mark_s - before_s;
  };
  std::vector<int64_t> rows_S(shards), pairs_S(shards);
  std::vector<uint8_t*> payload_S(shards);
  std::vector<char> is_in_memory_S(shards);
  std::vector<int64_t*> tokens_S(shards);
  count(all, rows_S.data(), pairs_S.data());
  if (static_cast<int64_t>(message_S.size()) < shards) message_S.resize(shards), answer_S.resize(shards), token_SR.resize(shards);
  for (int64_t s = 0; s < shards; ++s) {
    const int64_t payload_bytes = rows_S[s] * row_bytes + pairs_S[s] * kPairBytes;
    token_SR[s].resize(std::max<size_t>(token_SR[s].size(), rows_S[s]));
    payload_S[s] = room_for(e->memory_S[s], payload_bytes);
    is_in_memory_S[s] = payload_S[s] != nullptr;
    message_S[s].resize(std::max<size_t>(message_S[s].size(), kHeader + (payload_S[s] ? 0 : payload_bytes)));
    if (!payload_S[s]) payload_S[s] = message_S[s].data() + kHeader;
    tokens_S[s] = token_SR[s].data();
  }
  const int threads = e->tokens * row_bytes >= kWorthThreads ? e->threads : 1;
  Team packing(threads, false);
  packing.phase(shards, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t s = begin; s < end; ++s)
      if (pairs_S[s]) pack(all, s, rows_S[s], pairs_S[s], payload_S[s], tokens_S[s]);
  });
  packing.run();
  e->sent_bytes = e->received_bytes = 0;
  e->pack_s = lap_s();
  for (int64_t s = 0; s < shards; ++s) {
    e->state_S[s] = kNotAsked;
    if (pairs_S[s]) send_packet(*e, s, rows_S[s], pairs_S[s], message_S[s].data(), is_in_memory_S[s]);
  }
  e->send_s = lap_s();
  std::vector<Answer> answers;
  std::vector<int64_t> in_memory;  // shards whose answers lie there
  bool all_done = true;
  for (int64_t s = 0; s < shards; ++s) {
    const uint8_t* rows_RH = e->state_S[s] == kDone ? take_answer(*e, s, rows_S[s], answer_S[s]) : nullptr;
    if (rows_RH) answers.push_back({rows_RH, tokens_S[s], rows_S[s]});
    if (rows_RH && rows_RH != answer_S[s].data() + kHeader) in_memory.push_back(s);
    all_done = all_done && (rows_RH || e->state_S[s] == kNotAsked);
  }
  e->wait_s = lap_s();
  if (all_done) {
    Team combining(threads, false);
    combining.phase(e->tokens, 16, [&](int64_t begin, int64_t end, int) { combine(*e, answers, begin, end); });
    combining.run();
  } else {
    memset(e->sum_TH, 0, e->tokens * e->hidden * sizeof(float));
    for (const Answer& answer : answers) add(e->sum_TH, answer.rows_RH, e->dtype, answer.token_R, answer.rows, e->hidden);
  }
  for (const int64_t s : in_memory) release(e->memory_S[s]);
  e->add_s = lap_s();
  return all_done;
}
