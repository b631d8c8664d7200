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

// Attention of one row's query heads of one KV head over its sequence's pages, 16 keys at a time, softmax as it goes
// (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018).
void attend_row(const Layer& layer, const Step& step, int64_t row, int64_t group) {
  const int64_t size = layer.head_size, shared = layer.heads / layer.kv_heads, stride = layer.kv_heads * size;
  const int64_t length = step.length_T[row], begin = layer.window ? std::max<int64_t>(0, length - layer.window) : 0;
  const int64_t* pages = step.pages + step.sequence_T[row] * step.most_pages;
  alignas(64) float query[kMostShared * kMostHead], sum[kMostShared * kMostHead], rows[16 * kMostHead], weights[kMostShared * 16];
  float most[kMostShared], total[kMostShared];
  const uint16_t* q = step.query + (row * layer.heads + group * shared) * size;
  for (int64_t i = 0; i < shared * size; i += 16) {
    save(from_halves(q + i) * layer.scale, query + i);
    save(Floats{}, sum + i);
  }
  for (int64_t head = 0; head < shared; ++head) {
    most[head] = layer.sinks ? layer.sinks[group * shared + head] : -INFINITY;
    total[head] = layer.sinks ? 1.0f : 0.0f;
  }
  for (int64_t at = begin; at < length; at += 16) {
    const int64_t count = std::min<int64_t>(16, length - at);
    int64_t cache[16];
    for (int64_t j = 0; j < 16; ++j) {  // beyond the end the last key stands in, and weighs nothing
      const int64_t position = at + std::min(j, count - 1);
      cache[j] = (pages[position / layer.page_size] * layer.page_size + position % layer.page_size) * stride + group * size;
    }
    for (int64_t j = 0; j < 16; ++j)
      for (int64_t i = 0; i < size; i += 16) save(from_halves(layer.keys + cache[j] + i), rows + j * size + i);
    for (int64_t head = 0; head < shared; ++head) {
      Floats products[16];
      for (int64_t j = 0; j < 16; ++j) {
        products[j] = load(query + head * size) * load(rows + j * size);
        for (int64_t i = 16; i < size; i += 16) products[j] += load(query + head * size + i) * load(rows + j * size + i);
      }
      Floats scores = sums_of_16(products);
      if (layer.softcap > 0) {  // tanh(z) = 2 sigmoid(2 z) - 1
        scores = layer.softcap * (2.0f * sigmoid(scores * (2.0f / layer.softcap)) - 1.0f);
      }
      for (int64_t j = count; j < 16; ++j) scores[j] = -INFINITY;
      const float now = std::max(most[head], largest_of(scores));
      const Floats weight = exponential(scores - now);
      const float shrink = most[head] == now ? 1.0f : std::exp(most[head] - now);
      Floats weighed = weight;
      for (int64_t j = count; j < 16; ++j) weighed[j] = 0.0f;
      total[head] = total[head] * shrink + sum_of(weighed);
      save(weighed, weights + head * 16);
      if (shrink != 1.0f)
        for (int64_t i = 0; i < size; i += 16) save(load(sum + head * size + i) * shrink, sum + head * size + i);
      most[head] = now;
    }
    for (int64_t i = 0; i < size; i += 16) {
      Floats value[16];
      for (int64_t j = 0; j < 16; ++j) value[j] = from_halves(layer.values + cache[j] + i);
      for (int64_t head = 0; head < shared; ++head) {
        Floats out = load(sum + head * size + i);
        for (int64_t j = 0; j < 16; ++j) out += value[j] * weights[head * 16 + j];
        save(out, sum + head * size + i);
      }
    }
  }
  uint16_t* to = step.attended + (row * layer.heads + group * shared) * size;
  for (int64_t head = 0; head < shared; ++head)
    for (int64_t i = 0; i < size; i += 16)
      *reinterpret_cast<Halves*>(to + head * size + i) = to_halves(load(sum + head * size + i) * (1.0f / total[head]));
}

// Where the keys of positions first to first + kKeys - 1 of a sequence lie in the cache, in elements; -1 from `length` on.
INLINE void find_keys(const Layer& layer, const int64_t* pages, int64_t first, int64_t length, int64_t group, int64_t* cache) {
  const int64_t stride = layer.kv_heads * layer.head_size;
  for (int64_t j = 0; j < kKeys; ++j) {
    const int64_t at = first + j;
    cache[j] = at >= length ? -1 : (pages[at / layer.page_size] * layer.page_size + at % layer.page_size) * stride + group * layer.head_size;
  }
}

// Keys as packed weights (packed.h) whose outputs are keys, a panel for 32 of them; keys that are not there are zero.
INLINE void pack_keys(const Layer& layer, const int64_t* cache, uint16_t* panels) {
  const int64_t depth = layer.head_size / kDepth;
  for (int64_t j = 0; j < kKeys; ++j) {
    uint16_t* to = panels + j / 32 * 2 * depth * kBlock + j % 32 / kOuts * kBlock + j % kOuts * 2;
    for (int64_t d = 0; d < depth; ++d, to += 2 * kBlock)
      for (int64_t pair = 0; pair < 16; ++pair) {
        uint32_t both = 0;
        if (cache[j] >= 0) memcpy(&both, layer.keys + cache[j] + d * kDepth + 2 * pair, 4);
        memcpy(to + pair * 32, &both, 4);
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

// One row's scores of kKeys keys turned into weights, of which those before `begin` and from `end` on are zero: returns how much what was
// summed before shrinks.
INLINE float weigh(float* scores, int64_t begin, int64_t end, float* most, float* total, uint16_t* to) {
  for (int64_t j = 0; j < begin; ++j) scores[j] = -INFINITY;
  for (int64_t j = end; j < kKeys; ++j) scores[j] = -INFINITY;
  Floats largest = load(scores);
  for (int64_t j = 16; j < kKeys; j += 16) {
    const Floats next = load(scores + j);
    largest = next > largest ? next : largest;
  }
  const float now = std::max(*most, largest_of(largest)), shrink = *most == now ? 1.0f : std::exp(*most - now);
  Floats sum = {};
  for (int64_t j = 0; j < kKeys; j += 16) {
    const Floats score = load(scores + j);
    Floats weight = exponential(score - now);
    weight = score == -INFINITY ? Floats{} : weight;
    sum += weight;
    *reinterpret_cast<Halves*>(to + j / kDepth * kBlock + j % kDepth) = to_halves(weight);
  }
  *total = *total * shrink + sum_of(sum);
  *most = now;
  return shrink;
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
  alignas(64) float products[kQueries * 32], scores[kQueries * kKeys];
  int64_t cache[kKeys];
  for (int64_t first = oldest / kKeys * kKeys; first < length; first += kKeys) {
    find_keys(layer, pages, first, length, group, cache);
    pack_keys(layer, cache, room.keys);
    pack_values(layer, cache, room.values);
    for (int64_t head = 0; head < shared; ++head) {
      for (int64_t panel = 0; panel < kKeys / 32; ++panel) {
        product(room.query + head * kQueries * size, rows, room.keys + panel * 2 * depth * kBlock, depth, products);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t j = 0; j < 32; j += 16) {
            Floats score = load(products + r * 32 + j) * layer.scale;
            if (layer.softcap > 0) score = layer.softcap * (2.0f * sigmoid(score * (2.0f / layer.softcap)) - 1.0f);
            save(score, scores + r * kKeys + panel * 32 + j);
          }
      }
      float* sum = room.sum + head * kQueries * size;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t own = step.length_T[row + r], begin = layer.window ? std::max<int64_t>(0, own - layer.window) : 0;
        uint16_t* to = room.weights + r / kRows * (kKeys / kDepth) * kBlock + r % kRows * kDepth;
        if (own <= first || begin >= first + kKeys) {  // none of these keys
          for (int64_t d = 0; d < kKeys / kDepth; ++d) memset(to + d * kBlock, 0, kDepth * 2);
          continue;
        }
        const int64_t at = head * kQueries + r;
        const float shrink = weigh(scores + r * kKeys, std::max<int64_t>(0, begin - first), std::min<int64_t>(kKeys, own - first),
                                   room.most + at, room.total + at, to);
        if (shrink != 1.0f)
          for (int64_t i = 0; i < size; i += 16) save(load(sum + r * size + i) * shrink, sum + r * size + i);
      }
      for (int64_t panel = 0; panel < depth; ++panel) {
        product(room.weights, rows, room.values + panel * 2 * (kKeys / kDepth) * kBlock, kKeys / kDepth, products);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t i = 0; i < 32; i += 16) {
            float* to = sum + r * size + panel * 32 + i;
            save(load(to) + load(products + r * 32 + i), to);
          }
      }
    }
  }
  for (int64_t head = 0; head < shared; ++head)
    for (int64_t r = 0; r < rows; ++r) {
      const float scale = 1.0f / room.total[head * kQueries + r];
      uint16_t* to = step.attended + ((row + r) * layer.heads + group * shared + head) * size;
      for (int64_t i = 0; i < size; i += 16)
        *reinterpret_cast<Halves*>(to + i) = to_halves(load(room.sum + (head * kQueries + r) * size + i) * scale);
    }
}
