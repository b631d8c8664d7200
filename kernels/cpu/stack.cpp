// Decoder layers one after another: each one's dense half, its experts on their shards, and the sum that the next one gets.
//
// What an interpreter does between two layers it does with nothing of itself in the caches, where weights have just passed: 0.25 ms a
// layer. It is asked which replica computes what, where an expert has several, and gets back what is out of the ordinary: an expert
// without a replica, a shard that fails, a fleet that changes.

#include "dense.h"
#include "exchange.h"
#include "seconds.h"

namespace {

// Why the caller has to go on. kExperts: with the experts of layer `at`; kUnfinished: an exchange of it did not get all it asked for.
enum Stop : int32_t { kFinished = 0, kChanged = 1, kExperts = 2, kUnfinished = 3 };

// Seconds spent, by part.
enum Part { kDense = 0, kChoose = 1, kPack = 2, kSend = 3, kWait = 4, kAdd = 5 };

}  // namespace

// Laid out as kernels/cpu/stack.py has it. N layers of the stack, L rows of the tables, E experts.
struct Stack {
  void (*dense_layer)(const Layer*, const Step*, int isa, int threads);
  int (*exchange)(Exchange*);
  int32_t (*choose)(int64_t at);  // writes the step's shard_TK for a layer with replicas; 0: it could not
  const Layer* const* layer_N;
  const uint32_t* number_N;   // what packets call them
  const int64_t* row_N;       // theirs in the tables
  const int32_t* only_LE;     // the one shard of each expert; -1: there are several, or none
  int64_t *load_LE, *decode_LE;
  int64_t *dispatch_bytes_L, *combine_bytes_L;
  const uint8_t* is_decode_T;
  Step* step;
  Exchange* shards;           // its out_TH is hidden_TH; its choices are slices of the step's
  uint16_t* hidden_TH;        // what the next layer gets
  uint64_t* sequence;         // the last packet's
  const int32_t* changed;     // set by any thread
  double* spent;              // by Part
  int64_t layers, at, experts, expert_tp;
  int32_t isa, threads;
};

namespace {

// Finds each pair's shard; false: not every expert has exactly one.
bool find_shards(const int32_t* only_E, const Exchange& e) {
  int32_t* shard_TK = const_cast<int32_t*>(e.shard_TK);
  int32_t least = 0;
  for (int64_t at = 0; at < e.tokens * e.choices; ++at) {
    shard_TK[at] = only_E[e.ids_TK[at]];
    least = shard_TK[at] < least ? shard_TK[at] : least;
  }
  return least >= 0;
}

// Writes all slices of each choice of the router where the exchange reads them: slice s of expert e is number e * expert_tp + s.
void choose_slices(const Stack& s, Exchange& e) {
  int64_t* ids_TK = const_cast<int64_t*>(e.ids_TK);
  float* weights_TK = const_cast<float*>(e.weights_TK);
  for (int64_t at = 0; at < e.tokens * e.choices; ++at) {
    ids_TK[at] = s.step->ids[at / s.expert_tp] * s.expert_tp + at % s.expert_tp;
    weights_TK[at] = s.step->weights[at / s.expert_tp];
  }
}

bool has_changed(const Stack& s) { return __atomic_load_n(s.changed, __ATOMIC_ACQUIRE) != 0; }

}  // namespace

// Goes on from layer s->at; returns Stop. With kExperts and kUnfinished the step's normed, ids, weights and residual are that layer's.
extern "C" int stack_run(Stack* s) {
  Exchange& e = *s->shards;
  s->step->x = s->hidden_TH;
  for (; s->at < s->layers; ++s->at) {
    if (has_changed(*s)) return kChanged;
    const int64_t row = s->row_N[s->at];
    const double mark_s = now_s();
    s->dense_layer(s->layer_N[s->at], s->step, s->isa, s->threads);
    const double dense_s = now_s();
    s->spent[kDense] += dense_s - mark_s;
    if (has_changed(*s)) return kExperts;
    if (s->expert_tp > 1) choose_slices(*s, e);
    if (!find_shards(s->only_LE + row * s->experts, e) && !s->choose(s->at)) return kExperts;
    count_loads(e.ids_TK, s->is_decode_T, e.tokens, e.choices, s->load_LE + row * s->experts, s->decode_LE + row * s->experts);
    s->spent[kChoose] += now_s() - dense_s;
    e.layer = s->number_N[s->at];
    e.sequence = *s->sequence + 1;
    *s->sequence += e.shards;
    const bool is_done = s->exchange(&e) != 0;
    s->dispatch_bytes_L[row] += e.sent_bytes;
    s->combine_bytes_L[row] += e.received_bytes;
    s->spent[kPack] += e.pack_s, s->spent[kSend] += e.send_s, s->spent[kWait] += e.wait_s;
    s->spent[kAdd] += e.add_s;
    if (!is_done) return kUnfinished;
  }
  return kFinished;
}
