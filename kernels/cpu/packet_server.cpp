// A shard's loop over one link: reads a packet, computes it, sends the answer; what it cannot answer it leaves to its caller.
//
// One computes at a time, for all packets of its layer that wait, whoever brought them. Between packets of weights as large as the
// caches an interpreter would find nothing of itself in them: its few steps took 200 us a packet.

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "packets.h"
#include "seconds.h"

namespace {

constexpr int64_t kInbox = kHeader + (4 << 20);      // what one read may take
constexpr uint64_t kMostPayload = uint64_t{1} << 32;  // of a packet that is answered here

using RunExperts = void (*)(const uint16_t* x, const int64_t* row_P, const int64_t* slot_P, const float* weight_P, const uint16_t* const* up,
                            const uint16_t* const* down, const uint16_t* const* up_bias, const uint16_t* const* down_bias, float* out,
                            const int64_t* sizes, int has_gate, int kind, float alpha, float limit, float shift, int isa, int threads);

// The packed experts of a layer; see expert_mlp. All belong to the caller.
struct Layer {
  const int64_t* slot_E;
  const uint16_t *const *up, *const *down, *const *up_bias, *const *down_bias;
  int64_t experts, slots, hidden, width;
  int32_t has_gate, kind;
  float alpha, limit, shift;
};

// The last packet of a link; seconds: until its answer was sent, 0 before.
struct LastPacket {
  uint64_t sequence;
  uint32_t layer;
  double seconds;
};

struct Packet {
  const Header* header;
  const uint8_t* payload;
  double arrived_s;
  std::vector<int64_t> row_P, slot_P;
  std::vector<float> weight_P;
  const Memory* memory;
  std::vector<uint8_t>* answer;  // room for its header, and for its rows unless they lie in memory
  Header answer_header;
  bool is_in_memory;
  enum { kWaits, kAnswered, kForOthers } state = kWaits;
};

class Server {
 public:
  Server(RunExperts run, int isa, int threads, int64_t layers) : layers_(layers), run_(run), isa_(isa), threads_(threads) {}

  // Waits until what it replaces is not in use.
  void set_layer(int64_t index, const Layer* layer) {
    std::unique_lock<std::mutex> lock(mutex_);
    turn_.wait(lock, [&] { return !computing_; });
    layers_[index].reset(layer ? new Layer(*layer) : nullptr);
  }

  void answer(Packet& packet) {
    std::unique_lock<std::mutex> lock(mutex_);
    waiting_.push_back(&packet);
    while (packet.state == Packet::kWaits) {
      if (computing_) {
        turn_.wait(lock);
        continue;
      }
      std::vector<Packet*> batch;
      const uint32_t layer = waiting_.front()->header->layer;
      const auto is_next = [&](const Packet* waiting) { return waiting->header->layer == layer; };
      std::copy_if(waiting_.begin(), waiting_.end(), std::back_inserter(batch), is_next);
      waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(), is_next), waiting_.end());
      computing_ = true;
      const uint64_t epoch = epoch_;
      lock.unlock();
      const double began_s = now_s();
      compute(layer, batch, epoch);
      const double ended_s = now_s();
      lock.lock();
      for (Packet* one : batch) {
        queue_s_ += began_s - one->arrived_s;
        num_packets_ += one->state == Packet::kAnswered;
      }
      busy_s_ += ended_s - began_s;
      ++num_batches_;
      computing_ = false;
      turn_.notify_all();
    }
  }

  void set_epoch(uint64_t epoch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    epoch_ = epoch;
  }

  void counters(double* values) {
    const std::lock_guard<std::mutex> lock(mutex_);
    values[0] = static_cast<double>(num_packets_), values[1] = static_cast<double>(num_batches_), values[2] = busy_s_, values[3] = queue_s_;
  }

 private:
  // Only while computing_ is ours: nobody replaces a layer meanwhile.
  void compute(uint32_t index, std::vector<Packet*>& batch, uint64_t epoch) {
    const Layer* layer = index < layers_.size() ? layers_[index].get() : nullptr;
    std::vector<Packet*> known;
    for (Packet* packet : batch)
      if (layer && find_slots(*layer, *packet))
        known.push_back(packet);
      else
        packet->state = Packet::kForOthers;
    if (known.empty()) return;
    int64_t rows = 0, pairs = 0;
    for (const Packet* packet : known) rows += packet->header->rows, pairs += packet->header->pairs;
    const uint16_t* x = reinterpret_cast<const uint16_t*>(known[0]->payload);
    const int64_t *row_P = known[0]->row_P.data(), *slot_P = known[0]->slot_P.data();
    const float* weight_P = known[0]->weight_P.data();
    if (known.size() > 1) {
      join(*layer, known, rows);
      x = x_.data(), row_P = row_P_.data(), slot_P = slot_P_.data(), weight_P = weight_P_.data();
    }
    out_.resize(std::max<size_t>(out_.size(), rows * layer->hidden));
    const int64_t sizes[5] = {rows, pairs, layer->slots, layer->hidden, layer->width};
    run_(x, row_P, slot_P, weight_P, layer->up, layer->down, layer->up_bias, layer->down_bias, out_.data(), sizes, layer->has_gate,
         layer->kind, layer->alpha, layer->limit, layer->shift, isa_, threads_);
    const float* out = out_.data();
    for (Packet* packet : known) {
      write_answer(*packet, out, epoch);
      out += packet->header->rows * layer->hidden;
    }
  }

  static bool find_slots(const Layer& layer, Packet& packet) {
    const Header& header = *packet.header;
    if (header.hidden != layer.hidden) return false;
    const int64_t pairs = header.pairs;
    const uint8_t* block = packet.payload + static_cast<int64_t>(header.rows) * header.hidden * 2;
    packet.row_P.resize(pairs), packet.slot_P.resize(pairs), packet.weight_P.resize(pairs);
    for (int64_t p = 0; p < pairs; ++p) {
      int32_t row, expert;
      memcpy(&row, block + p * 4, 4);
      memcpy(&expert, block + (pairs + p) * 4, 4);
      if (row < 0 || row >= static_cast<int64_t>(header.rows) || expert < 0 || expert >= layer.experts) return false;
      packet.row_P[p] = row;
      packet.slot_P[p] = layer.slot_E[expert];
      if (packet.slot_P[p] < 0) return false;
    }
    memcpy(packet.weight_P.data(), block + 2 * pairs * 4, pairs * 4);
    return true;
  }

  // Lays several packets out as one.
  void join(const Layer& layer, const std::vector<Packet*>& packets, int64_t rows) {
    x_.resize(rows * layer.hidden);
    row_P_.clear(), slot_P_.clear(), weight_P_.clear();
    int64_t first = 0;
    for (const Packet* packet : packets) {
      memcpy(x_.data() + first * layer.hidden, packet->payload, static_cast<int64_t>(packet->header->rows) * layer.hidden * 2);
      for (const int64_t row : packet->row_P) row_P_.push_back(first + row);
      slot_P_.insert(slot_P_.end(), packet->slot_P.begin(), packet->slot_P.end());
      weight_P_.insert(weight_P_.end(), packet->weight_P.begin(), packet->weight_P.end());
      first += packet->header->rows;
    }
  }

  static void write_answer(Packet& packet, const float* rows, uint64_t epoch) {
    const Header& asked = *packet.header;
    const int64_t elements = static_cast<int64_t>(asked.rows) * asked.hidden;
    const Header header{kMagic, kCombine,   kBfloat16, 0, asked.generation, asked.sequence, epoch,
                        asked.layer, asked.rows, 0,        asked.hidden, static_cast<uint64_t>(elements * 2), {}};
    uint8_t* to = room_for(*packet.memory, elements * 2);
    packet.is_in_memory = to != nullptr;
    packet.answer->resize(std::max<size_t>(packet.answer->size(), kHeader + (to ? 0 : elements * 2)));
    round_all(rows, elements, to ? to : packet.answer->data() + kHeader);
    packet.answer_header = header;
    packet.state = Packet::kAnswered;
  }

  std::mutex mutex_;
  std::condition_variable turn_;
  std::deque<Packet*> waiting_;
  bool computing_ = false;
  uint64_t epoch_ = 0;
  int64_t num_packets_ = 0, num_batches_ = 0;
  double busy_s_ = 0, queue_s_ = 0;
  std::vector<std::unique_ptr<Layer>> layers_;
  // Of whoever computes.
  std::vector<uint16_t> x_;
  std::vector<int64_t> row_P_, slot_P_;
  std::vector<float> weight_P_, out_;
  const RunExperts run_;
  const int isa_, threads_;
};

// Says by its header alone whether a packet may be answered here.
bool is_ours(const Header& header, uint32_t generation) {
  return header.magic == kMagic && header.kind == kDispatch && header.dtype == kBfloat16 && (header.flags & ~kInMemory) == 0 &&
         header.generation == generation && header.rows > 0 && header.pairs > 0 && header.hidden > 0 &&
         header.payload_bytes <= kMostPayload &&
         header.payload_bytes == uint64_t{header.rows} * header.hidden * 2 + uint64_t{header.pairs} * kPairBytes;
}

}  // namespace

extern "C" void* packet_server_new(void* run, int isa, int threads, int64_t layers) {
  return new Server(reinterpret_cast<RunExperts>(run), isa, threads, layers);
}

// layer: null where there is none; index below the number of layers.
extern "C" void packet_server_set_layer(void* server, int64_t index, const Layer* layer) {
  static_cast<Server*>(server)->set_layer(index, layer);
}

extern "C" void packet_server_set_epoch(void* server, uint64_t epoch) { static_cast<Server*>(server)->set_epoch(epoch); }

// values: packets and batches answered, seconds computing, seconds that packets waited.
extern "C" void packet_server_counters(void* server, double* values) { static_cast<Server*>(server)->counters(values); }

// Answers packets until one is not for it, one took longer than slow_s or the peer is gone (returns 0), or an answer is not taken
// (returns errno; -1: in time).
// left: what was read and not answered, valid until this thread's next call.
extern "C" int packet_server_serve(void* server, int fd, const Memory* memory, uint32_t generation, double slow_s, LastPacket* last,
                                   const uint8_t** left, int64_t* left_bytes) {
  static thread_local std::vector<uint8_t> inbox(kInbox), answer;
  int64_t got = 0;
  *left = inbox.data();
  for (;;) {
    // The bytes of a packet behind this one, if the peer does not wait for answers, are at the front already.
    if (got < kHeader) got += read_at_least(fd, inbox.data() + got, kHeader - got, static_cast<int64_t>(inbox.size()) - got);
    *left = inbox.data();
    *left_bytes = got;
    if (got < kHeader) return 0;
    Header header;
    memcpy(&header, inbox.data(), kHeader);
    if (!is_ours(header, generation)) return 0;
    const bool is_in_memory = header.flags == kInMemory;
    if (is_in_memory && (!memory->incoming || static_cast<int64_t>(header.payload_bytes) > memory->room)) return 0;
    const int64_t wanted = kHeader + (is_in_memory ? 0 : static_cast<int64_t>(header.payload_bytes));
    if (static_cast<int64_t>(inbox.size()) < wanted) inbox.resize(wanted);
    if (got < wanted) got += read_at_least(fd, inbox.data() + got, wanted - got, wanted - got);
    *left = inbox.data();
    *left_bytes = got;
    if (got < wanted) return 0;
    *last = {header.sequence, header.layer, 0};
    Packet packet{&header, is_in_memory ? memory->incoming + kFront : inbox.data() + kHeader, now_s(), {}, {}, {}, memory, &answer, {}, false};
    static_cast<Server*>(server)->answer(packet);
    if (packet.state == Packet::kForOthers) return 0;
    got -= wanted;
    memmove(inbox.data(), inbox.data() + wanted, got);
    *left_bytes = got;
    if (is_in_memory) release(*memory);
    if (!send_message(fd, answer.data(), packet.answer_header, *memory, packet.is_in_memory)) return errno ? errno : -1;
    last->seconds = now_s() - packet.arrived_s;
    if (last->seconds > slow_s) return 0;
  }
}
