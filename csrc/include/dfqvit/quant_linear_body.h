// The body of the quant_linear kernels, compiled once for each CPU path: the includer sets DFQVIT_PATH (a namespace of
// quant_linear_multiply.h), DFQVIT_SIMD (one of simd.h) and DFQVIT_TARGET. So no include guard.

namespace dfqvit {
namespace quant {
namespace DFQVIT_PATH {

#define DFQVIT_INLINE DFQVIT_TARGET inline __attribute__((always_inline))
namespace simd = ::dfqvit::simd::DFQVIT_SIMD;
using simd::vec;
constexpr int kVectors = kOutputs / simd::kLanes;  // that hold 16 values

// Numerators beyond this many steps are cut there: the result is clamped anyway, and the quotient stays exact.
constexpr float kSteps = 512.0f;

// Vectors that are worked on side by side, step by step: one alone would wait for each step's latency. In AVX-512 four
// rows of 16; the other paths have too few registers for more than the vectors of one row.
constexpr int kGroup = simd::kLanes == kOutputs ? 4 : 1;

#define DFQVIT_EACH for (int i = 0; i < n; ++i)

// x[i] / scale to bytes at places[i], or all at places[0], one after the other. The arguments `scale` to `zero` are one
// vector for each x, or one for every `columns`; `zero` one for every `zeros`.
template <int n, int columns, bool kTogether = false, int zeros = columns>
DFQVIT_INLINE void quantize_vectors(uint8_t* const* places, vec* x, const vec* scale, const vec* reciprocal,
                                    const vec* zero, vec greatest) {
  if (!simd::round_alike<n, columns>(x, reciprocal)) {
    DFQVIT_EACH {
      const vec limit = simd::mul(scale[i % columns], simd::broadcast(kSteps));
      x[i] = simd::min(simd::max(x[i], simd::sub(simd::broadcast(0.0f), limit)), limit);
    }
    simd::exact_quotients<n, columns>(x, scale, reciprocal);
  }
  simd::store_integers<n, zeros, kTogether>(places, x, zero, greatest);
}

constexpr size_t kAhead =
    2048;  // bytes; from memory this halves the time, which the processor's own prefetch leaves idle

template <class T>
DFQVIT_TARGET bool quantize_rows(const T* x, int64_t rows, int64_t columns, const Quantizer& q, uint8_t* out,
                                 int64_t out_stride) {
  constexpr int n = 4, kStep = n * simd::kLanes;
  const vec scale = simd::broadcast(q.scale), reciprocal = simd::broadcast(q.reciprocal);
  const vec zero = simd::broadcast(q.zero), greatest = simd::broadcast(q.greatest);
  vec strange = simd::broadcast(0.0f);  // NaN once a value was not finite
  for (int64_t r = 0; r < rows; ++r, x += columns, out += out_stride) {
    for (int64_t first = 0; first < columns; first += kStep) {
      T rest[kStep];
      uint8_t bytes[kStep];
      const bool whole = first + kStep <= columns;
      if (!whole) {
        std::memset(static_cast<void*>(rest), 0, sizeof(rest));
        std::memcpy(static_cast<void*>(rest), x + first, (columns - first) * sizeof(T));
      }
      for (size_t b = 0; b < kStep * sizeof(T); b += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(x + first) + kAhead + b);
      }
      const T* from = whole ? x + first : rest;
      uint8_t* to = whole ? out + first : bytes;
      vec v[n];
      DFQVIT_EACH {
        v[i] = simd::load(from + i * simd::kLanes);
        strange = simd::add(strange, simd::sub(v[i], v[i]));
      }
      quantize_vectors<n, 1, true>(&to, v, &scale, &reciprocal, &zero, greatest);
      if (!whole) std::memcpy(out + first, bytes, columns - first);
    }
    std::memset(out + columns, 0, out_stride - columns);
  }
  return !simd::any_nan(strange);
}

// Quantizes contiguous float rows [rows, columns] to bytes, zeros up to out_stride. False when a value was NaN or Inf.
DFQVIT_TARGET inline bool quantize(const void* x, Type type, int64_t rows, int64_t columns, const Quantizer& q,
                                   uint8_t* out, int64_t out_stride) {
  if (type == Type::bf16) {
    return quantize_rows(static_cast<const ::dfqvit::simd::bfloat*>(x), rows, columns, q, out, out_stride);
  }
  if (type == Type::f16) {
    return quantize_rows(static_cast<const ::dfqvit::simd::half*>(x), rows, columns, q, out, out_stride);
  }
  return quantize_rows(static_cast<const float*>(x), rows, columns, q, out, out_stride);
}

#include "dfqvit/quant_linear_gelu.h"

// Adds rows of 16 values to y [n / kVectors rows]; `stride`: elements from row to row.
template <int n, class From>
DFQVIT_INLINE void add_rows(vec* y, const From* rows, int64_t stride) {
  DFQVIT_EACH y[i] = simd::add(y[i], simd::load(rows + i / kVectors * stride + i % kVectors * simd::kLanes));
}
template <int n>
DFQVIT_INLINE void add_rows(vec* y, const char* rows, Type type, int64_t stride) {
  const void* p = rows;
  if (type == Type::bf16) return add_rows<n>(y, static_cast<const ::dfqvit::simd::bfloat*>(p), stride);
  if (type == Type::f16) return add_rows<n>(y, static_cast<const ::dfqvit::simd::half*>(p), stride);
  add_rows<n>(y, static_cast<const float*>(p), stride);
}

constexpr int64_t size_of(Type type) {
  return type == Type::f32 ? 4 : type == Type::u8 ? 1 : 2;
}

// The epilogue of quant_linear, in float32 and in the order of the reference. The result consists of bytes or of floats
// of e.type: which, is asked where they are stored, since to compile all of this for each takes long.
template <Activation kActivation, bool kBytes>
struct Standard {
  const Epilogue& e;

  const int32_t* start(int64_t block) const { return e.columns[block].start; }

  // The first rows of the tiles, in the order in which they are computed. With acm those of nearly the same tokens
  // follow each other, whatever image they are of: what the first of them read is still near when the others add it.
  std::vector<int64_t> order(int64_t rows) const {
    std::vector<int64_t> firsts((rows + kRows - 1) / kRows);
    if (!e.acm || rows <= e.tokens) {
      for (size_t tile = 0; tile < firsts.size(); ++tile) firsts[tile] = tile * kRows;
      return firsts;
    }
    std::vector<int64_t> places(e.tokens / kRows + 2);  // of the first tile of each group of kRows tokens
    const auto each = [&](const auto& visit) {
      int64_t token = e.first_row % e.tokens;
      for (int64_t first = 0; first < rows; first += kRows) {
        visit(first, token / kRows);
        if ((token += kRows) >= e.tokens) token %= e.tokens;
      }
    };
    each([&](int64_t, int64_t group) { ++places[group + 1]; });
    for (size_t group = 1; group < places.size(); ++group) places[group] += places[group - 1];
    each([&](int64_t first, int64_t group) { firsts[places[group]++] = first; });
    return firsts;
  }

  // Asks for what rows `row` on and `blocks` blocks will add, so that it is there when their sums are.
  void ahead(int64_t row, int64_t count, int64_t block, int blocks) const {
    const int64_t first = e.first_row + row;
    if (e.residual) ask(e.residual, e.residual_type, first, count, e.out_features, block * kOutputs, blocks * kOutputs);
    if (!e.acm) return;
    const int64_t token = first % e.tokens, unbroken = std::min(count, e.tokens - token);
    const bool side_by_side = e.acm_block == kOutputs;
    const int64_t width = side_by_side ? blocks * kOutputs : kOutputs;
    for (int j = 0; j < (side_by_side ? 1 : blocks); ++j) {
      const int64_t place = (block + j) * e.acm_block;
      ask(e.acm, e.acm_type, token, unbroken, e.acm_row, place, width);
      ask(e.acm, e.acm_type, 0, std::min(count - unbroken, token), e.acm_row, place, width);
    }
  }

  // sums [count, 16] of rows `row` on and of one block.
  DFQVIT_TARGET void operator()(int64_t row, int64_t count, int64_t block, const int32_t* sums) const {
    const int64_t column = block * kOutputs, first = e.first_row + row;
    const int64_t valid = std::min<int64_t>(kOutputs, e.out_features - column), step = size_of(e.residual_type);
    const int64_t place = first * e.out_features + column;
    const char* residual = e.residual ? static_cast<const char*>(e.residual) + place * step : nullptr;
    uint8_t* out = static_cast<uint8_t*>(e.out) + (first * e.out_stride + column) * size();
    const char* acm = e.acm ? static_cast<const char*>(e.acm) + block * e.acm_block * size_of(e.acm_type) : nullptr;
    int64_t token = acm ? first % e.tokens : 0;
    if (valid == kOutputs) {
      const int64_t stride = e.out_features;
      if (acm && residual) return finish<true, true>(sums, count, block, acm, token, residual, stride, out);
      if (acm) return finish<true, false>(sums, count, block, acm, token, residual, stride, out);
      if (residual) return finish<false, true>(sums, count, block, acm, token, residual, stride, out);
      return finish<false, false>(sums, count, block, acm, token, residual, stride, out);
    }
    for (int64_t i = 0; i < count; ++i, sums += kOutputs, out += e.out_stride * size()) {  // the last block, row by row
      alignas(64) char acm_copy[kOutputs * sizeof(float)] = {}, residual_copy[kOutputs * sizeof(float)] = {};
      alignas(64) uint8_t result[kOutputs * sizeof(float)];
      if (residual) std::memcpy(residual_copy, residual + i * e.out_features * step, valid * step);
      if (acm) {
        const int64_t width = size_of(e.acm_type);
        std::memcpy(acm_copy, acm + (token + i) % e.tokens * e.acm_row * width, valid * width);
      }
      finish<true, true>(sums, 1, block, acm_copy, 0, residual_copy, 0, result);
      std::memcpy(out, result, valid * size());
    }
  }

 private:
  int64_t size() const { return kBytes ? 1 : size_of(e.type); }

  // `width` elements at `place` of `count` rows.
  void ask(const void* addends, Type type, int64_t row, int64_t count, int64_t stride, int64_t place,
           int64_t width) const {
    const char* line = static_cast<const char*>(addends) + (row * stride + place) * size_of(type);
    if (stride == width) {
      width *= count;
      count = 1;
    }
    for (int64_t i = 0; i < count; ++i, line += stride * size_of(type)) {
      for (int64_t b = 0; b < width * size_of(type); b += 64) __builtin_prefetch(line + b);
    }
  }

  struct Constants {
    vec scale[kVectors], bias[kVectors], out_scale[kVectors], out_reciprocal[kVectors], out_zero[kVectors];
  };

  // 16 outputs of `count` rows. `stride`: elements from row to row of the residual. Adding 0 where there is
  // neither changes nothing but -0.
  template <bool kAcm, bool kResidual>
  DFQVIT_TARGET void finish(const int32_t* sums, int64_t count, int64_t block, const char* acm, int64_t token,
                            const char* residual, int64_t stride, uint8_t* out) const {
    const Columns& columns = e.columns[block];
    Constants c;
    for (int v = 0; v < kVectors; ++v) {
      c.scale[v] = simd::load(columns.scale + v * simd::kLanes);
      c.bias[v] = simd::load(columns.bias + v * simd::kLanes);
      c.out_scale[v] = simd::load(columns.out_scale + v * simd::kLanes);
      c.out_reciprocal[v] = simd::load(columns.out_reciprocal + v * simd::kLanes);
      c.out_zero[v] = simd::load(columns.out_zero + v * simd::kLanes);
    }
    const int64_t acm_row = e.acm_row * size_of(e.acm_type), residual_row = stride * size_of(e.residual_type);
    for (int64_t i = 0; i < count;) {
      const char* corrections = kAcm ? acm + token * acm_row : nullptr;
      const bool whole = i + kGroup <= count && (!kAcm || token + kGroup <= e.tokens);
      const int rows = whole ? kGroup : 1;
      if (whole) {
        group<kAcm, kResidual, kGroup>(sums, c, corrections, residual, stride, out);
      } else {
        group<kAcm, kResidual, 1>(sums, c, corrections, residual, stride, out);
      }
      i += rows;
      sums += rows * kOutputs;
      out += rows * e.out_stride * size();
      if (kResidual) residual += rows * residual_row;
      token = token + rows < e.tokens ? token + rows : 0;
    }
  }

  // kRowsAtOnce rows of the above, of one image.
  template <bool kAcm, bool kResidual, int kRowsAtOnce>
  DFQVIT_INLINE void group(const int32_t* sums, const Constants& c, const char* acm, const char* residual,
                           int64_t stride, uint8_t* out) const {
    constexpr int n = kRowsAtOnce * kVectors;
    vec y[n], addend[n];
    uint8_t* places[n];
    DFQVIT_EACH {
      const int v = i % kVectors, at = v * simd::kLanes;
      addend[i] = c.bias[v];
      y[i] = simd::mul(c.scale[v], simd::from_integers(sums + i * simd::kLanes));
      places[i] = out + (i / kVectors * e.out_stride + at) * size();
    }
    if constexpr (kAcm) add_rows<n>(addend, acm, e.acm_type, e.acm_row);
    DFQVIT_EACH y[i] = simd::add(y[i], addend[i]);
    if constexpr (kActivation == Activation::gelu && kBytes) gelu<n>(y, kCoarseGelu);
    if constexpr (kActivation == Activation::gelu_tanh && kBytes) gelu<n>(y, kCoarseGeluTanh);
    if constexpr (kActivation == Activation::gelu && !kBytes) gelu<n>(y, kGelu);
    if constexpr (kActivation == Activation::gelu_tanh && !kBytes) gelu<n>(y, kGeluTanh);
    if constexpr (kActivation == Activation::swish) swish<n>(y, e.slope);
    if constexpr (kResidual) add_rows<n>(y, residual, e.residual_type, stride);
    if constexpr (kBytes) {
      const vec greatest = simd::broadcast(e.out_greatest);
      quantize_vectors<n, kVectors>(places, y, c.out_scale, c.out_reciprocal, c.out_zero, greatest);
    } else if (e.type == Type::bf16) {
      DFQVIT_EACH simd::store(reinterpret_cast<::dfqvit::simd::bfloat*>(places[i]), y[i]);
    } else if (e.type == Type::f16) {
      DFQVIT_EACH simd::store(reinterpret_cast<::dfqvit::simd::half*>(places[i]), y[i]);
    } else if (e.stream) {
      DFQVIT_EACH simd::stream(reinterpret_cast<float*>(places[i]), y[i]);
    } else {
      DFQVIT_EACH simd::store(reinterpret_cast<float*>(places[i]), y[i]);
    }
  }
};

// 4-bit and 3-bit chunks to bytes; the layout stands in kernels/quant_linear/blocked.py.
DFQVIT_TARGET inline void unpack(const uint8_t* packed, int64_t chunks, int bits, uint8_t* out) {
  typedef uint8_t bytes __attribute__((vector_size(64)));
  typedef uint64_t words __attribute__((vector_size(64)));
  for (int64_t c = 0; c < chunks; ++c, packed += 128 * bits, out += kChunk) {
    words vectors[8];
    std::memcpy(vectors, packed, 128 * bits);
    for (int v = 0; v < 16; ++v) {
      bytes q;
      if (bits == 4) {
        q = ((bytes)(vectors[v / 2] >> (v % 2 * 4)) & 15) - 8;
      } else {
        const bytes low = (bytes)(vectors[v / 4] >> (v % 4 * 2)) & 3, high = (bytes)(vectors[4 + v / 8] >> (v % 8)) & 1;
        q = low + high * 4 - 4;
      }
      std::memcpy(out + 64 * v, &q, sizeof(q));
    }
  }
}

// A tile's sums on their way to `finish`.
template <class Finish>
struct Tile {
  const int32_t* sums;
  int64_t row, count, block;
  int blocks;

  void announce_to(const Finish& finish) const {
    if (blocks > 0) finish.ahead(row, count, block, blocks);
  }
  DFQVIT_TARGET void hand_to(const Finish& finish) const {
    for (int j = 0; j < blocks; ++j) finish(row, count, block + j, sums + j * kRows * kOutputs);
  }
};

// The product of `rows` rows of bytes with the blocks begin to end, tile by tile: finish(row, count, block, sums) takes
// `count` rows of 16 sums that began at finish.start(block). `a` has `stride` bytes from row to row and is readable to
// chunks * 64 in each row; what stands there beyond K does not matter. `scratch` holds weight.scratch_bytes(end -
// begin).
//
// Some rows meet all the blocks, then the next rows (part_rows). A tile is finished after the next one was begun: the
// processor computes both at once.
template <class Finish>
DFQVIT_TARGET void gemm(const uint8_t* a, int64_t stride, int64_t rows, const Weight& weight, int64_t begin,
                        int64_t end, uint8_t* scratch, const Finish& finish) {
  if (rows == 0 || begin >= end) return;
  alignas(64) int32_t buffers[2][kHeadroom + 2 * kRows * kOutputs];
  const int64_t panel = weight.chunks * kChunk;
  const uint8_t* values = weight.values(begin);
  int64_t step = 4 * weight.stride;
  if (weight.bits != 8) {
    for (int64_t block = begin; block < end; ++block) {
      unpack(weight.values(block), weight.chunks, weight.bits, scratch + (block - begin) * panel);
    }
    values = scratch;
    step = panel;
  }
  prepare(rows);
  asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
  const int64_t part = part_rows(weight.chunks * kDepth, panel * (end - begin), kRows) / kRows;
  const std::vector<int64_t> order = finish.order(rows);
  const int64_t tiles = static_cast<int64_t>(order.size());
  Tile<Finish> last{};
  for (int64_t first = 0; first < tiles; first += part) {
    for (int64_t block = begin; block < end; block += 2) {
      const int blocks = static_cast<int>(std::min<int64_t>(2, end - block));
      const uint8_t* panels[2] = {values + (block - begin) * step, values + (block - begin + blocks - 1) * step};
      const int32_t* starts[2] = {finish.start(block), finish.start(block + blocks - 1)};
      int32_t moved[2][kOutputs];
      for (int j = 0; j < 2 && kOffset != 0; ++j) {
        const int32_t* total = weight.sums(block + std::min(j, blocks - 1));
        for (int n = 0; n < kOutputs; ++n) moved[j][n] = starts[j][n] + kOffset * total[n];
        starts[j] = moved[j];
      }
      for (int64_t t = first; t < std::min(tiles, first + part); ++t) {
        int32_t* sums = buffers[last.sums == buffers[0] + kHeadroom] + kHeadroom;
        const int64_t r = order[t], count = std::min<int64_t>(kRows, rows - r);
        last.announce_to(finish);
        multiply(a, stride, r, rows, panels, starts, blocks, weight.depth, weight.fits, sums);
        last.hand_to(finish);
        last = {sums, r, count, block, blocks};
      }
    }
  }
  last.hand_to(finish);
  release();
  simd::finish_stream();
}

template <Activation kActivation>
DFQVIT_TARGET void linear_with(const uint8_t* a, int64_t stride, int64_t rows, const Weight& weight, int64_t begin,
                               int64_t end, uint8_t* scratch, const Epilogue& e) {
  if (e.type == Type::u8) {
    gemm(a, stride, rows, weight, begin, end, scratch, Standard<kActivation, true>{e});
  } else {
    gemm(a, stride, rows, weight, begin, end, scratch, Standard<kActivation, false>{e});
  }
}

// gemm with the standard epilogue.
DFQVIT_TARGET inline void linear(const uint8_t* a, int64_t stride, int64_t rows, const Weight& weight, int64_t begin,
                                 int64_t end, uint8_t* scratch, const Epilogue& e) {
  if (e.activation == Activation::gelu) {
    linear_with<Activation::gelu>(a, stride, rows, weight, begin, end, scratch, e);
  } else if (e.activation == Activation::gelu_tanh) {
    linear_with<Activation::gelu_tanh>(a, stride, rows, weight, begin, end, scratch, e);
  } else if (e.activation == Activation::swish) {
    linear_with<Activation::swish>(a, stride, rows, weight, begin, end, scratch, e);
  } else {
    linear_with<Activation::none>(a, stride, rows, weight, begin, end, scratch, e);
  }
}

#undef DFQVIT_EACH
#undef DFQVIT_INLINE
}  // namespace DFQVIT_PATH
}  // namespace quant
}  // namespace dfqvit
