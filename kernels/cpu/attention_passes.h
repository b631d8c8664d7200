// Attention over pages of a cache for one instruction set, see product.h and dense.cpp: one row by itself, or neighbouring rows together.

// Adds a to b crosswise, so that after folding by 8, 4, 2 and 1 lane i has the sum of all lanes of the i-th of 16 vectors.
template <int width>
INLINE Floats fold(Floats a, Floats b) {
  Ints own, other;
  for (int lane = 0; lane < 16; ++lane) {
    own[lane] = lane & width ? 16 + lane : lane;
    other[lane] = own[lane] ^ width;
  }
  return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
}

INLINE Floats sums_of_16(Floats* v) {
  for (int i = 0; i < 8; ++i) v[i] = fold<8>(v[i], v[i + 8]);
  for (int i = 0; i < 4; ++i) v[i] = fold<4>(v[i], v[i + 4]);
  for (int i = 0; i < 2; ++i) v[i] = fold<2>(v[i], v[i + 2]);
  return fold<1>(v[0], v[1]);
}

// Walks through the cache rows of a sequence's positions; beyond the end it stays at the last.
struct Walk {
  const int64_t* page;
  int64_t page_size, within, left;

  Walk(const Layer& layer, const int64_t* pages, int64_t position, int64_t length)
      : page(pages + position / layer.page_size), page_size(layer.page_size), within(position % layer.page_size), left(length - position) {}

  int64_t next() {
    const int64_t row = *page * page_size + within;
    if (--left > 0 && ++within == page_size) ++page, within = 0;
    return row;
  }
};

// Products of a query with 16 keys, to be summed over the lanes; cache: where the keys' elements begin. size: a multiple of 16.
INLINE void query_products(const uint16_t* q, const uint16_t* keys, const int64_t* cache, int64_t size, Floats* products) {
#if PRODUCT > 0
  if (size % 32 == 0) {
    for (int64_t j = 0; j < 16; ++j) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t i = 0; i < size; i += 32)
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(q + i), (__m512bh)_mm512_loadu_si512(keys + cache[j] + i));
      products[j] = (Floats)sum;
    }
    return;
  }
#endif
  for (int64_t j = 0; j < 16; ++j) {
    products[j] = Floats{};
    for (int64_t i = 0; i < size; i += 16) products[j] += from_halves(q + i) * from_halves(keys + cache[j] + i);
  }
}

// Asks for a head's part of a cache row, for the second-level cache.
INLINE void prefetch_head(const uint16_t* head, int64_t size) {
  for (int64_t i = 0; i < size; i += 32) __builtin_prefetch(head + i, 0, 2);
}

// Has a query head attend to 16 keys more, of which the first `count` are there; cache: where the keys' elements begin.
INLINE void attend_block(const Layer& layer, const uint16_t* q, const int64_t* cache, int64_t count, Attended& to, float* weights) {
  Floats products[16];
  query_products(q, layer.keys, cache, layer.head_size, products);
  Floats scores = sums_of_16(products) * layer.scale;
  if (layer.softcap > 0) scores = layer.softcap * (2.0f * sigmoid(scores * (2.0f / layer.softcap)) - 1.0f);  // tanh(z) = 2 sigmoid(2 z) - 1
  for (int64_t j = count; j < 16; ++j) scores[j] = -INFINITY;
  const float now = std::max(to.most, largest_of(scores)), shrink = to.most == now ? 1.0f : std::exp(to.most - now);
  Floats weight = exponential(scores - now);
  for (int64_t j = count; j < 16; ++j) weight[j] = 0.0f;
  to.total = to.total * shrink + sum_of(weight);
  to.most = now;
  save(weight, weights);
  if (shrink != 1.0f)
    for (int64_t i = 0; i < layer.head_size; i += 16) save(load(to.sum + i) * shrink, to.sum + i);
}

// Adds the values of 16 keys to what `heads` query heads of one KV head have attended to.
INLINE void add_values(const Layer& layer, const int64_t* cache, int64_t heads, const float* weights, Attended* to) {
  for (int64_t i = 0; i < layer.head_size; i += 16) {
    Floats value[16];
    for (int64_t j = 0; j < 16; ++j) value[j] = from_halves(layer.values + cache[j] + i);
    for (int64_t head = 0; head < heads; ++head) {
      Floats out = load(to[head].sum + i);
      for (int64_t j = 0; j < 16; ++j) out += value[j] * weights[head * 16 + j];
      save(out, to[head].sum + i);
    }
  }
}

// Attention of one row's query heads of some neighbouring KV heads over its sequence's pages, 16 keys at a time, softmax as it goes
// (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018). All KV heads of a block of keys before the next block: they
// lie beside each other.
void attend_row(const Layer& layer, const Step& step, int64_t row, int64_t first_group, int64_t end_group, Room& room) {
  const int64_t size = layer.head_size, shared = layer.heads / layer.kv_heads, stride = layer.kv_heads * size;
  const int64_t length = step.length_T[row], begin = layer.window ? std::max<int64_t>(0, length - layer.window) : 0;
  const int64_t first_head = first_group * shared, heads = (end_group - first_group) * shared;
  const uint16_t* q = step.query + (row * layer.heads + first_head) * size;
  float* sums = room.row_sums(heads * size);
  room.heads.resize(heads);
  for (int64_t head = 0; head < heads; ++head)
    room.heads[head] = {sums + head * size, layer.sinks ? 1.0f : 0.0f, layer.sinks ? layer.sinks[first_head + head] : -INFINITY};
  memset(sums, 0, heads * size * sizeof(float));
  alignas(64) float weights[kMostShared * 16];
  Walk walk(layer, step.pages + step.sequence_T[row] * step.most_pages, begin, length);
  int64_t coming[16];
  for (int64_t j = 0; j < 16; ++j) coming[j] = walk.next() * stride;
  for (int64_t at = begin; at < length; at += 16) {
    const int64_t count = std::min<int64_t>(16, length - at);  // the last key stands in for what is beyond, and weighs nothing
    int64_t block[16], cache[16];
    memcpy(block, coming, sizeof(block));
    for (int64_t j = 0; j < 16; ++j) coming[j] = walk.next() * stride;
    for (int64_t group = first_group; group < end_group; ++group) {
      for (int64_t j = 0; j < 16; ++j) {
        cache[j] = block[j] + group * size;
        prefetch_head(layer.keys + coming[j] + group * size, size);
        prefetch_head(layer.values + coming[j] + group * size, size);
      }
      const int64_t own = (group - first_group) * shared;
      for (int64_t head = 0; head < shared; ++head)
        attend_block(layer, q + (own + head) * size, cache, count, room.heads[own + head], weights + head * 16);
      add_values(layer, cache, shared, weights, room.heads.data() + own);
    }
  }
  uint16_t* to = step.attended + (row * layer.heads + first_head) * size;
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t i = 0; i < size; i += 16)
      *reinterpret_cast<Halves*>(to + head * size + i) = to_halves(load(sums + head * size + i) * (1.0f / room.heads[head].total));
}

// Where the keys of positions first to first + kKeys - 1 of a sequence lie in the cache, in elements; -1 from `length` on.
INLINE void find_keys(const Layer& layer, const int64_t* pages, int64_t first, int64_t length, int64_t group, int64_t* cache) {
  const int64_t stride = layer.kv_heads * layer.head_size;
  for (int64_t j = 0; j < kKeys; ++j) {
    const int64_t at = first + j;
    cache[j] = at >= length ? -1 : (pages[at / layer.page_size] * layer.page_size + at % layer.page_size) * stride + group * layer.head_size;
  }
}

// One of four steps that turn 16 vectors of 16 words by their diagonal.
template <int width>
INLINE void swap_across(Floats* v) {
  Ints upper, lower;
  for (int lane = 0; lane < 16; ++lane) {
    upper[lane] = lane & width ? 16 + (lane ^ width) : lane;
    lower[lane] = lane & width ? 16 + lane : lane ^ width;
  }
  for (int i = 0; i < 16; ++i)
    if (!(i & width)) {
      const Floats one = v[i], other = v[i | width];
      v[i] = __builtin_shuffle(one, other, upper);
      v[i | width] = __builtin_shuffle(one, other, lower);
    }
}

// Keys as packed weights (packed.h) whose outputs are keys, a panel for 32 of them; keys that are not there are zero.
INLINE void pack_keys(const Layer& layer, const int64_t* cache, uint16_t* panels) {
  const int64_t depth = layer.head_size / kDepth;
  for (int64_t j = 0; j < kKeys; j += kOuts) {
    uint16_t* to = panels + j / 32 * 2 * depth * kBlock + j % 32 / kOuts * kBlock;
    for (int64_t d = 0; d < depth; ++d, to += 2 * kBlock) {
      Floats words[16];  // by key, pairs of elements; then by pair
      for (int64_t key = 0; key < 16; ++key)
        words[key] = cache[j + key] < 0 ? Floats{} : *reinterpret_cast<const Floats*>(layer.keys + cache[j + key] + d * kDepth);
      swap_across<8>(words);
      swap_across<4>(words);
      swap_across<2>(words);
      swap_across<1>(words);
      for (int64_t pair = 0; pair < 16; ++pair) *reinterpret_cast<Floats*>(to + pair * 32) = words[pair];
    }
  }
}

// Values as packed weights whose inputs are keys; zero where a key is not there: what lies in the cache then may be anything.
INLINE void pack_values(const Layer& layer, const int64_t* cache, uint16_t* panels) {
  const int64_t size = layer.head_size;
  for (int64_t j = 0; j < kKeys; j += 2)
    for (int64_t out = 0; out < size; out += kOuts) {
      uint16_t* to = panels + (out / 32 * 2 * (kKeys / kDepth) + j / kDepth * 2 + out % 32 / kOuts) * kBlock + j % kDepth / 2 * 32;
      const Words low = cache[j] < 0 ? Words{} : __builtin_convertvector(*reinterpret_cast<const Halves*>(layer.values + cache[j] + out), Words);
      const Words high = cache[j + 1] < 0 ? Words{} : __builtin_convertvector(*reinterpret_cast<const Halves*>(layer.values + cache[j + 1] + out), Words);
      *reinterpret_cast<Words*>(to) = low | (high << 16);
    }
}

// One row's scores of kKeys keys, of which each 32 follow `stride` floats behind the 32 before, turned into weights: those of keys before
// `begin` and from `end` on are zero. Returns how much what was summed before shrinks.
INLINE float weigh(float* scores, int64_t stride, float scale, int64_t begin, int64_t end, float* most, float* total, uint16_t* to) {
  for (int64_t j = 0; j < begin; ++j) scores[j / 32 * stride + j % 32] = -INFINITY;
  for (int64_t j = end; j < kKeys; ++j) scores[j / 32 * stride + j % 32] = -INFINITY;
  Floats largest = load(scores);
  for (int64_t j = 16; j < kKeys; j += 16) largest = larger(load(scores + j / 32 * stride + j % 32), largest);
  const float now = std::max(*most, largest_of(largest) * scale), shrink = *most == now ? 1.0f : std::exp(*most - now);
  Floats sum = {};
  for (int64_t j = 0; j < kKeys; j += 16) {
    const Floats score = load(scores + j / 32 * stride + j % 32);
    Floats weight = exponential(score * scale - now);
    weight = score == -INFINITY ? Floats{} : weight;
    sum += weight;
    *reinterpret_cast<Halves*>(to + j / kDepth * kBlock + j % kDepth) = to_halves(weight);
  }
  *total = *total * shrink + sum_of(sum);
  *most = now;
  return shrink;
}

// The scores of kKeys keys, [32 keys][kQueries][32]; with a soft cap they are scaled already.
INLINE void score_keys(const Layer& layer, const uint16_t* query, int64_t rows, const uint16_t* keys, float* scores) {
  const int64_t depth = layer.head_size / kDepth;
  for (int64_t panel = 0; panel < kKeys / 32; ++panel) {
    float* to = scores + panel * kQueries * 32;
    product(query, rows, keys + panel * 2 * depth * kBlock, depth, to);
    if (layer.softcap > 0)
      for (int64_t i = 0; i < rows * 32; i += 16)
        save(layer.softcap * (2.0f * sigmoid(load(to + i) * (layer.scale * 2.0f / layer.softcap)) - 1.0f), to + i);
  }
}

// Attention of neighbouring rows of one sequence, at most kQueries, for the query heads of one KV head: kKeys keys at a time, softmax as it
// goes. The keys' blocks begin at fixed positions, so that a row's result does not depend on where its sequence was cut.
void attend_rows(const Layer& layer, const Step& step, int64_t row, int64_t rows, int64_t group, Room& room) {
  const int64_t size = layer.head_size, shared = layer.heads / layer.kv_heads, depth = size / kDepth;
  const int64_t* pages = step.pages + step.sequence_T[row] * step.most_pages;
  const int64_t length = step.length_T[row + rows - 1];
  const int64_t oldest = layer.window ? std::max<int64_t>(0, step.length_T[row] - layer.window) : 0;
  room.make(shared, size);
  for (int64_t head = 0; head < shared; ++head) {
    uint16_t* blocks = room.query + head * kQueries * size;
    for (int64_t r = 0; r < rows; ++r) {
      const uint16_t* from = step.query + ((row + r) * layer.heads + group * shared + head) * size;
      for (int64_t d = 0; d < depth; ++d) memcpy(blocks + (r / kRows * depth + d) * kBlock + r % kRows * kDepth, from + d * kDepth, kDepth * 2);
      const float sink = layer.sinks ? layer.sinks[group * shared + head] : -INFINITY;
      room.most[head * kQueries + r] = sink;
      room.total[head * kQueries + r] = layer.sinks ? 1.0f : 0.0f;
    }
  }
  memset(room.sum, 0, shared * kQueries * size * sizeof(float));
  alignas(64) float scores[kQueries * kKeys];
  int64_t cache[kKeys];
  const float scale = layer.softcap > 0 ? 1.0f : layer.scale;
  for (int64_t first = oldest / kKeys * kKeys; first < length; first += kKeys) {
    find_keys(layer, pages, first, length, group, cache);
    pack_keys(layer, cache, room.keys);
    pack_values(layer, cache, room.values);
    for (int64_t head = 0; head < shared; ++head) {
      score_keys(layer, room.query + head * kQueries * size, rows, room.keys, scores);
      float* sum = room.sum + head * kQueries * size;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t own = step.length_T[row + r], begin = layer.window ? std::max<int64_t>(0, own - layer.window) : 0;
        uint16_t* to = room.weights + r / kRows * (kKeys / kDepth) * kBlock + r % kRows * kDepth;
        if (own <= first || begin >= first + kKeys) {  // none of these keys
          for (int64_t d = 0; d < kKeys / kDepth; ++d) memset(to + d * kBlock, 0, kDepth * 2);
          continue;
        }
        const int64_t at = head * kQueries + r;
        const float shrink = weigh(scores + r * 32, kQueries * 32, scale, std::max<int64_t>(0, begin - first),
                                   std::min<int64_t>(kKeys, own - first), room.most + at, room.total + at, to);
        if (shrink != 1.0f)
          for (int64_t i = 0; i < size; i += 16) {
            float* part = sum + (i / 32 * kQueries + r) * 32 + i % 32;
            save(load(part) * shrink, part);
          }
      }
      for (int64_t panel = 0; panel < depth; ++panel)
        product(room.weights, rows, room.values + panel * 2 * (kKeys / kDepth) * kBlock, kKeys / kDepth, sum + panel * kQueries * 32, true);
    }
  }
  for (int64_t head = 0; head < shared; ++head)
    for (int64_t r = 0; r < rows; ++r) {
      const float part = 1.0f / room.total[head * kQueries + r];
      uint16_t* to = step.attended + ((row + r) * layer.heads + group * shared + head) * size;
      for (int64_t i = 0; i < size; i += 16) {
        const float* from = room.sum + head * kQueries * size + (i / 32 * kQueries + r) * 32 + i % 32;
        *reinterpret_cast<Halves*>(to + i) = to_halves(load(from) * part);
      }
    }
}
