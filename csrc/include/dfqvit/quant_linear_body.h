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

DFQVIT_INLINE void quantize_vector(uint8_t* out, vec x, vec scale, vec reciprocal, vec zero, vec greatest) {
  const vec limit = simd::mul(scale, simd::broadcast(kSteps));
  x = simd::min(simd::max(x, simd::sub(simd::broadcast(0.0f), limit)), limit);
  simd::store_integers(out, simd::exact_quotient(x, scale, reciprocal), zero, greatest);
}

template <class T>
DFQVIT_TARGET bool quantize_rows(const T* x, int64_t rows, int64_t columns, const Quantizer& q, uint8_t* out,
                                 int64_t out_stride) {
  const vec scale = simd::broadcast(q.scale), reciprocal = simd::broadcast(q.reciprocal);
  const vec zero = simd::broadcast(q.zero), greatest = simd::broadcast(q.greatest);
  vec strange = simd::broadcast(0.0f);  // NaN once a value was not finite
  for (int64_t r = 0; r < rows; ++r, x += columns, out += out_stride) {
    int64_t i = 0;
    for (; i + simd::kLanes <= columns; i += simd::kLanes) {
      const vec v = simd::load(x + i);
      strange = simd::add(strange, simd::sub(v, v));
      quantize_vector(out + i, v, scale, reciprocal, zero, greatest);
    }
    if (i < columns) {
      T rest[simd::kLanes] = {};
      uint8_t bytes[simd::kLanes];
      std::memcpy(rest, x + i, (columns - i) * sizeof(T));
      const vec v = simd::load(rest);
      strange = simd::add(strange, simd::sub(v, v));
      quantize_vector(bytes, v, scale, reciprocal, zero, greatest);
      std::memcpy(out + i, bytes, columns - i);
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

// x (1/2 + x P(x^2) / Q(x^2)), x in the fraction cut to +-limit, and 0 below -limit. The fraction approximates
// erf(x / sqrt 2) / 2, or its tanh form, fitted so that the greatest error of the whole is least (by reweighted least
// squares): 1.2e-8, beside the rounding of float32, about 2e-7 |x|.
struct Gelu {
  float p[6], q[5], limit;
};
constexpr Gelu kGelu = {
    {0x1.988448p-2f, 0x1.15aea8p-5f, 0x1.3336eep-8f, 0x1.6548ecp-13f, 0x1.b211c0p-18f, 0x1.91c998p-26f},
    {0x1.01abacp-2f, 0x1.d61532p-6f, 0x1.f01a88p-10f, 0x1.394f8ep-14f, 0x1.48bc66p-20f},
    5.3f};
constexpr Gelu kGeluTanh = {
    {0x1.988460p-2f, 0x1.e31c54p-6f, 0x1.d8a60ep-9f, 0x1.0b31a0p-13f, 0x1.e3d978p-18f, 0x1.bef6b2p-26f},
    {0x1.ee664ep-3f, 0x1.8788bap-6f, 0x1.4c4c0ap-10f, 0x1.39a1f0p-14f, 0x1.73be46p-20f},
    5.2f};

DFQVIT_INLINE vec gelu(vec x, const Gelu& c) {
  const vec limit = simd::broadcast(c.limit), minus_limit = simd::broadcast(-c.limit);
  const vec cut = simd::min(simd::max(x, minus_limit), limit);
  const vec z = simd::mul(cut, cut);
  vec p = simd::broadcast(c.p[5]), q = simd::broadcast(c.q[4]);
  for (int i = 4; i >= 0; --i) p = simd::fma(p, z, simd::broadcast(c.p[i]));
  for (int i = 3; i >= 0; --i) q = simd::fma(q, z, simd::broadcast(c.q[i]));
  q = simd::fma(q, z, simd::broadcast(1.0f));
  const vec part = simd::mul(simd::mul(cut, p), simd::reciprocal(q));
  return simd::zero_below(simd::fma(x, part, simd::mul(x, simd::broadcast(0.5f))), x, minus_limit);
}

DFQVIT_INLINE vec load_as(const void* p, Type type, int64_t i) {
  if (type == Type::bf16) return simd::load(static_cast<const ::dfqvit::simd::bfloat*>(p) + i);
  if (type == Type::f16) return simd::load(static_cast<const ::dfqvit::simd::half*>(p) + i);
  return simd::load(static_cast<const float*>(p) + i);
}

constexpr int64_t size_of(Type type) {
  return type == Type::f32 ? 4 : type == Type::u8 ? 1 : 2;
}

// One block's Columns in registers.
struct Constants {
  vec scale[kVectors], bias[kVectors], out_scale[kVectors], out_reciprocal[kVectors], out_zero[kVectors];

  DFQVIT_INLINE explicit Constants(const Columns& c) {
    for (int v = 0; v < kVectors; ++v) {
      scale[v] = simd::load(c.scale + v * simd::kLanes);
      bias[v] = simd::load(c.bias + v * simd::kLanes);
      out_scale[v] = simd::load(c.out_scale + v * simd::kLanes);
      out_reciprocal[v] = simd::load(c.out_reciprocal + v * simd::kLanes);
      out_zero[v] = simd::load(c.out_zero + v * simd::kLanes);
    }
  }
};

// The epilogue of quant_linear, in float32 and in the order of the reference. T: what the result consists of.
template <Activation kActivation, class T>
struct Standard {
  const Epilogue& e;

  // 16 outputs of one row.
  DFQVIT_INLINE void finish(const int32_t* sums, const Columns& columns, const Constants& c, const float* acm,
                            const void* residual, T* out) const {
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * simd::kLanes;
      vec y = simd::mul(c.scale[v], simd::difference(sums + at, columns.offset + at));
      y = simd::add(y, c.bias[v]);
      if (acm != nullptr) y = simd::add(y, simd::load(acm + at));
      if constexpr (kActivation == Activation::gelu) y = gelu(y, kGelu);
      if constexpr (kActivation == Activation::gelu_tanh) y = gelu(y, kGeluTanh);
      if (residual != nullptr) y = simd::add(y, load_as(residual, e.residual_type, at));
      if constexpr (sizeof(T) == 1) {
        quantize_vector(out + at, y, c.out_scale[v], c.out_reciprocal[v], c.out_zero[v],
                        simd::broadcast(e.out_greatest));
      } else {
        simd::store(out + at, y);
      }
    }
  }

  // sums [count, 16] of rows `row` on and of one block.
  DFQVIT_INLINE void operator()(int64_t row, int64_t count, int64_t block, const int32_t* sums) const {
    const Columns& columns = e.columns[block];
    const Constants constants(columns);
    const int64_t column = block * kOutputs, first = e.first_row + row;
    const int64_t valid = std::min<int64_t>(kOutputs, e.out_features - column), step = size_of(e.residual_type);
    const char* residual = static_cast<const char*>(e.residual);
    int64_t token = e.acm ? first % e.tokens : 0;
    for (int64_t i = 0; i < count; ++i, sums += kOutputs) {
      const int64_t place = (first + i) * e.out_features + column;
      const float* acm = e.acm ? e.acm + token * e.out_features + column : nullptr;
      const char* addend = residual ? residual + place * step : nullptr;
      T* out = static_cast<T*>(e.out) + (first + i) * e.out_stride + column;
      if (valid == kOutputs) {
        finish(sums, columns, constants, acm, addend, out);
      } else {
        float acm_copy[kOutputs] = {}, residual_copy[kOutputs] = {};
        T result[kOutputs];
        if (acm) std::memcpy(acm_copy, acm, valid * sizeof(float));
        if (addend) std::memcpy(residual_copy, addend, valid * step);
        finish(sums, columns, constants, acm ? acm_copy : nullptr, addend ? residual_copy : nullptr, result);
        std::memcpy(out, result, valid * sizeof(T));
      }
      if (++token == e.tokens) token = 0;
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

// The product of `rows` rows of bytes with the blocks begin to end, tile by tile: finish(row, count, block, sums) takes
// each. `a` has `stride` bytes from row to row and is readable to chunks * 64 in each row; what stands there beyond K
// does not matter. `scratch` holds weight.scratch_bytes().
template <class Finish>
DFQVIT_TARGET void gemm(const uint8_t* a, int64_t stride, int64_t rows, const Weight& weight, int64_t begin,
                        int64_t end, uint8_t* scratch, const Finish& finish) {
  if (rows == 0) return;
  alignas(64) int32_t buffer[kHeadroom + 2 * kRows * kOutputs];
  int32_t* sums = buffer + kHeadroom;
  prepare(rows);
  for (int64_t block = begin; block < end; block += 2) {
    const int blocks = static_cast<int>(std::min<int64_t>(2, end - block));
    const uint8_t* panels[2];
    for (int j = 0; j < blocks; ++j) {
      panels[j] = weight.values(block + j);
      if (weight.bits != 8) {
        uint8_t* panel = scratch + j * weight.chunks * kChunk;
        unpack(panels[j], weight.chunks, weight.bits, panel);
        panels[j] = panel;
      }
    }
    asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
    for (int64_t r = 0; r < rows; r += kRows) {
      multiply(a, stride, r, rows, panels, blocks, weight.chunks, sums);
      for (int j = 0; j < blocks; ++j) {
        finish(r, std::min<int64_t>(kRows, rows - r), block + j, sums + j * kRows * kOutputs);
      }
    }
  }
  release();
}

template <Activation kActivation>
DFQVIT_TARGET void linear_with(const uint8_t* a, int64_t stride, int64_t rows, const Weight& weight, int64_t begin,
                               int64_t end, uint8_t* scratch, const Epilogue& e) {
  if (e.type == Type::u8) {
    gemm(a, stride, rows, weight, begin, end, scratch, Standard<kActivation, uint8_t>{e});
  } else if (e.type == Type::bf16) {
    gemm(a, stride, rows, weight, begin, end, scratch, Standard<kActivation, ::dfqvit::simd::bfloat>{e});
  } else if (e.type == Type::f16) {
    gemm(a, stride, rows, weight, begin, end, scratch, Standard<kActivation, ::dfqvit::simd::half>{e});
  } else {
    gemm(a, stride, rows, weight, begin, end, scratch, Standard<kActivation, float>{e});
  }
}

// gemm with the standard epilogue.
DFQVIT_TARGET inline void linear(const uint8_t* a, int64_t stride, int64_t rows, const Weight& weight, int64_t begin,
                                 int64_t end, uint8_t* scratch, const Epilogue& e) {
  if (e.activation == Activation::gelu) {
    linear_with<Activation::gelu>(a, stride, rows, weight, begin, end, scratch, e);
  } else if (e.activation == Activation::gelu_tanh) {
    linear_with<Activation::gelu_tanh>(a, stride, rows, weight, begin, end, scratch, e);
  } else {
    linear_with<Activation::none>(a, stride, rows, weight, begin, end, scratch, e);
  }
}

#undef DFQVIT_INLINE
}  // namespace DFQVIT_PATH
}  // namespace quant
}  // namespace dfqvit
