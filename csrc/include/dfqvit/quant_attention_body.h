// The body of the quant_attention kernels, compiled once for each CPU path: the includer sets DFQVIT_PATH, DFQVIT_SIMD
// and DFQVIT_TARGET as for quant_linear_body.h, whose products it uses. So no include guard.

namespace dfqvit {
namespace quant {
namespace DFQVIT_PATH {

#define DFQVIT_INLINE DFQVIT_TARGET inline __attribute__((always_inline))

constexpr float kLog2E = 1.44269504f, kLog2Of255 = 7.99435344f;
constexpr int kStrip = kRows < 16 ? kRows : 16;  // queries whose scores are in the first cache at once
constexpr int kRun = 4;                          // blocks of 16 that become bytes together
constexpr int64_t kHop = kRows * kOutputs;       // from a strip's sums of one block to those of the next

// Copies q where it cannot be read in place, and packs k and v like weights.
DFQVIT_TARGET inline void pack(const Source& from, const Heads& heads, const Packed& to) {
  const int64_t tokens = heads.tokens, depth = heads.depth;
  const auto row = [&](int64_t t) { return from.q + (from.index ? from.index[t] : t) * from.stride; };
  for (int64_t t = 0; t < tokens && to.queries != nullptr; ++t) {
    std::memcpy(to.queries + t * to.keys.chunks * kDepth, row(t), depth);
  }
  for (int64_t first = 0; first < tokens; first += kOutputs) {
    const uint8_t* rows[kOutputs];  // past the end the last one again: its scores are passed over
    for (int64_t i = 0; i < kOutputs; ++i) rows[i] = row(std::min(first + i, tokens - 1)) + from.third;
    int32_t* sums = to.key_starts + first;
    std::memset(sums, 0, kOutputs * sizeof(int32_t));
    for (int64_t c = 0; c < to.keys.chunks; ++c) {
      uint8_t* bytes = const_cast<uint8_t*>(to.keys.values(first / kOutputs)) + c * kChunk;
      simd::pack_outputs(rows, std::min<int64_t>(kDepth, depth - c * kDepth), bytes, sums);
      for (const uint8_t*& r : rows) r += kDepth;
    }
    for (int64_t i = 0; i < kOutputs; ++i) sums[i] = first + i < tokens ? (kOffset - heads.q_zero) * sums[i] : kNoKey;
  }
  uint8_t nothing[kDepth];  // 0, once its highest bit is flipped
  std::memset(nothing, 0x80, sizeof(nothing));
  for (int64_t t = 0; t < tokens; t += 4) {
    for (int64_t c = 0; c < depth; c += kDepth) {
      const uint8_t* rows[4];
      for (int64_t i = 0; i < 4; ++i) rows[i] = t + i < tokens ? row(t + i) + 2 * from.third + c : nothing;
      uint8_t* bytes = const_cast<uint8_t*>(to.values.values(c / kOutputs)) + t * kOutputs;
      simd::pack_depths(rows, std::min<int64_t>(kDepth, depth - c), bytes, to.values.stride * 4);
    }
  }
  for (int64_t block = 0; block < blocks_of(depth); ++block) {
    int32_t sums[kOutputs] = {};
    const int8_t* line = reinterpret_cast<const int8_t*>(to.values.values(block));
    for (int64_t t = 0; t < tokens && kOffset != 0; t += 4, line += 4 * kOutputs) {
      for (int n = 0; n < kOutputs; ++n) {
        sums[n] += kOffset * (line[4 * n] + line[4 * n + 1] + line[4 * n + 2] + line[4 * n + 3]);
      }
    }
    std::memcpy(to.value_starts + block * kOutputs, sums, sizeof(sums));
  }
}

DFQVIT_INLINE void add_to(float* scores, const float* addend, int64_t valid) {
  if (valid < kOutputs) {
    for (int64_t j = 0; j < valid; ++j) scores[j] += addend[j];
    return;
  }
  for (int at = 0; at < kOutputs; at += simd::kLanes) {
    simd::store(scores + at, simd::add(simd::load(scores + at), simd::load(addend + at)));
  }
}

// In place: the sums of one row, all blocks of it, to scores with `bias` and `mask`. Keys that do not exist get -inf.
DFQVIT_TARGET inline void add_biases(int32_t* sums, const Heads& heads, const float* bias, const float* mask) {
  for (int64_t key = 0; key < heads.tokens; key += kOutputs, sums += kHop) {
    const int64_t valid = std::min<int64_t>(kOutputs, heads.tokens - key);
    float scores[kOutputs];
    for (int at = 0; at < kOutputs; at += simd::kLanes) {
      simd::store(scores + at, simd::mul(simd::from_integers(sums + at), simd::broadcast(heads.factor)));
    }
    if (bias != nullptr) add_to(scores, bias + key, valid);
    if (mask != nullptr) add_to(scores, mask + key, valid);
    for (int64_t j = valid; j < kOutputs; ++j) scores[j] = -std::numeric_limits<float>::infinity();
    std::memcpy(sums, scores, sizeof(scores));
  }
}

// A vector of a row's scores: still integers, to be multiplied by the factor, or complete.
template <bool kComplete>
DFQVIT_INLINE vec score(const int32_t* sums) {
  if constexpr (kComplete) return simd::load(reinterpret_cast<const float*>(sums));
  return simd::from_integers(sums);
}

// The greatest of one row's scores, in two chains of comparisons, each of which waits only for itself.
template <bool kComplete>
DFQVIT_INLINE float greatest_of(const int32_t* sums, int64_t blocks) {
  vec even = score<kComplete>(sums), odd = even;
  for (int64_t block = 0; block < blocks; block += 2) {
    const int32_t* other = sums + (block + 1 < blocks ? block + 1 : block) * kHop;
    for (int at = 0; at < kOutputs; at += simd::kLanes) {
      even = simd::max(even, score<kComplete>(sums + block * kHop + at));
      odd = simd::max(odd, score<kComplete>(other + at));
    }
  }
  return simd::reduce_max(simd::max(even, odd));
}

// Up to kRun blocks of one row: 255 exp(score - greatest) = 2^(score * factor + offset), rounded to bytes. Always kRun
// blocks of bytes, because the tiles' loads would wait for the end of a store of fewer.
template <bool kComplete>
DFQVIT_INLINE void exponentials(const int32_t* sums, int64_t blocks, vec factor, vec offset, uint8_t* steps) {
  vec e[kRun * kVectors];
  for (int i = 0; i < kRun * kVectors; ++i) {
    e[i] = simd::broadcast(0.0f);
    if (i >= blocks * kVectors) continue;
    const vec x = score<kComplete>(sums + i / kVectors * kHop + i % kVectors * simd::kLanes);
    e[i] = simd::exp2_coarse(simd::fma(x, factor, offset));
  }
  simd::store_bytes<kRun * kVectors>(steps, e);
}

// The sums of `rows` rows to whole steps of 1/255 of each row's greatest exponential. `scale`: of the scores, times
// log2(e).
template <bool kComplete>
DFQVIT_TARGET void softmax(const int32_t* sums, int64_t rows, int64_t blocks, float scale, uint8_t* steps,
                           int64_t steps_stride) {
  float offsets[kRows];  // first those of all rows: they come late, and one by one each row would wait for its own
  for (int64_t r = 0; r < rows; ++r) {
    offsets[r] = kLog2Of255 - greatest_of<kComplete>(sums + r * kOutputs, blocks) * scale;
  }
  const vec factor = simd::broadcast(scale);
  for (int64_t r = 0; r < rows; ++r, sums += kOutputs, steps += steps_stride) {
    const vec offset = simd::broadcast(offsets[r]);
    int64_t block = 0;
    for (; block + kRun <= blocks; block += kRun) {
      exponentials<kComplete>(sums + block * kHop, kRun, factor, offset, steps + block * kOutputs);
    }
    if (block < blocks) {
      exponentials<kComplete>(sums + block * kHop, blocks - block, factor, offset, steps + block * kOutputs);
    }
  }
}

// n blocks of one row of P V to results: (v_scale / total) * sum - v_scale * v_zero, and to integers where asked for.
template <int n>
DFQVIT_INLINE void results(const int32_t* sums, const Heads& heads, float inverse, int64_t valid, uint8_t* bytes,
                           float* floats) {
  constexpr int count = n * kVectors;
  const vec scale = simd::broadcast(inverse), offset = simd::broadcast(-heads.v_scale * heads.v_zero);
  vec y[count];
  for (int i = 0; i < count; ++i) {
    y[i] = simd::fma(simd::from_integers(sums + i / kVectors * kHop + i % kVectors * simd::kLanes), scale, offset);
  }
  if (bytes != nullptr) {
    const vec step = simd::broadcast(heads.out.scale), reciprocal = simd::broadcast(heads.out.reciprocal);
    const vec zero = simd::broadcast(heads.out.zero);
    uint8_t rounded[n * kOutputs];
    uint8_t* to = valid == n * kOutputs ? bytes : rounded;
    quantize_vectors<count, 1, true>(&to, y, &step, &reciprocal, &zero, simd::broadcast(heads.out.greatest));
    if (valid < n * kOutputs) std::memcpy(bytes, rounded, valid);
  } else {
    float values[n * kOutputs];
    for (int i = 0; i < count; ++i) simd::store(values + i * simd::kLanes, y[i]);
    std::memcpy(floats, values, valid * sizeof(float));
  }
}

DFQVIT_TARGET inline void results_row(const int32_t* sums, const Heads& heads, int32_t total, uint8_t* bytes,
                                      float* floats) {
  const float inverse = heads.v_scale / static_cast<float>(total);
  int64_t column = 0;
  const auto at = [&](auto* p) { return p == nullptr ? p : p + column; };
  for (; column + kRun * kOutputs <= heads.depth; column += kRun * kOutputs) {
    results<kRun>(sums + column * kRows, heads, inverse, kRun * kOutputs, at(bytes), at(floats));
  }
  for (; column < heads.depth; column += kOutputs) {
    const int64_t valid = std::min<int64_t>(kOutputs, heads.depth - column);
    results<1>(sums + column * kRows, heads, inverse, valid, at(bytes), at(floats));
  }
}

// `rows` rows of a from r on, times all blocks of `weight`: sums[block][kRows][16].
DFQVIT_TARGET inline void products(const uint8_t* a, int64_t stride, int64_t r, int64_t rows, const Weight& weight,
                                   int64_t blocks, const int32_t* starts, int32_t* sums) {
  asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
  for (int64_t block = 0; block < blocks; block += 2) {
    const int count = static_cast<int>(std::min<int64_t>(2, blocks - block));
    const uint8_t* panels[2] = {weight.values(block), weight.values(block + count - 1)};
    const int32_t* begin[2] = {starts + block * kOutputs, starts + (block + count - 1) * kOutputs};
    multiply(a, stride, r, rows, panels, begin, count, weight.depth, weight.fits, sums + block * kHop);
  }
}

// The query rows begin to end of one head of one window.
DFQVIT_TARGET inline void attend(const Head& head, const Heads& heads, int64_t begin, int64_t end, const Strip& strip) {
  const Weight &keys = head.packed.keys, &values = head.packed.values;
  const int64_t key_blocks = blocks_of(heads.tokens), value_blocks = blocks_of(heads.depth);
  const int64_t steps_stride = values.chunks * kDepth;
  const bool complete = head.bias != nullptr || head.mask != nullptr;
  prepare(heads.tokens);
  for (int64_t first = begin; first < end; first += kStrip) {
    const int64_t rows = std::min<int64_t>(kStrip, end - first);
    products(head.queries, head.query_stride, first, std::min(first + kStrip, heads.tokens), keys, key_blocks,
             head.packed.key_starts, strip.scores);
    for (int64_t r = 0; complete && r < rows; ++r) {
      const int64_t place = (first + r) * heads.tokens;
      add_biases(strip.scores + r * kOutputs, heads, head.bias ? head.bias + place : nullptr,
                 head.mask ? head.mask + place : nullptr);
    }
    if (complete) {
      softmax<true>(strip.scores, rows, key_blocks, kLog2E, strip.steps, steps_stride);
    } else {
      softmax<false>(strip.scores, rows, key_blocks, heads.factor * kLog2E, strip.steps, steps_stride);
    }
    // A whole tile even where there are fewer rows: stale ones do no harm.
    products(strip.steps, steps_stride, 0, std::min<int64_t>(kStrip, heads.tokens), values, value_blocks,
             head.packed.value_starts, strip.results);
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t total = simd::sum_bytes(strip.steps + r * steps_stride, strip.ones, values.chunks);
      const int64_t place = (head.index ? head.index[first + r] : first + r) * heads.out_stride;
      results_row(strip.results + r * kOutputs, heads, total, head.out_bytes ? head.out_bytes + place : nullptr,
                  head.out_floats ? head.out_floats + place : nullptr);
    }
  }
  release();
}

#undef DFQVIT_INLINE
}  // namespace DFQVIT_PATH
}  // namespace quant
}  // namespace dfqvit
