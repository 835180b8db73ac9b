// The body of the layer_norm_quantize kernels, compiled once for each CPU path: the includer sets DFQVIT_PATH,
// DFQVIT_SIMD and DFQVIT_TARGET as for quant_linear_body.h, whose rounding it uses. So no include guard.
//
// All paths give the same bits: sums are in 16 partial sums whatever the vectors' size, and nothing is fused.

namespace dfqvit {
namespace quant {
namespace DFQVIT_PATH {

#define DFQVIT_INLINE DFQVIT_TARGET inline __attribute__((always_inline))
#define DFQVIT_EACH for (int i = 0; i < n; ++i)

// The sum of 16 partial sums, halves to halves.
DFQVIT_INLINE float sum_of(const vec* partial) {
  float lanes[kOutputs];
  for (int v = 0; v < kVectors; ++v) simd::store(lanes + v * simd::kLanes, partial[v]);
  for (int step = kOutputs / 2; step > 0; step /= 2) {
    for (int l = 0; l < step; ++l) lanes[l] += lanes[l + step];
  }
  return lanes[0];
}

// n runs of 16 channels: (line - mean) * inverse * weight + bias.
template <int n>
DFQVIT_INLINE void normalise(const float* line, const float* weight, const float* bias, vec mean, vec inverse, vec* y) {
  for (int i = 0; i < n * kVectors; ++i) {
    const int at = i * simd::kLanes;
    const vec normed = simd::mul(simd::sub(simd::load(line + at), mean), inverse);
    y[i] = simd::add(simd::mul(normed, simd::load(weight + at)), simd::load(bias + at));
  }
}

// Where a row goes: to bytes. put<n>(y, r, c): the results of n runs from channel c of row r on.
struct ToBytes {
  const Quantizer& q;
  uint8_t* out;
  int64_t stride;

  template <int n>
  DFQVIT_INLINE void put(const vec* y, int64_t r, int64_t c) const {
    quantised<n>(y, out + r * stride + c);
  }
  DFQVIT_INLINE void put_some(const vec* y, int64_t r, int64_t c, int64_t some) const {
    uint8_t bytes[kOutputs];
    quantised<1>(y, bytes);
    std::memcpy(out + r * stride + c, bytes, some);
  }

 private:
  template <int n>
  DFQVIT_INLINE void quantised(const vec* y, uint8_t* to) const {
    const vec scale = simd::broadcast(q.scale), reciprocal = simd::broadcast(q.reciprocal);
    const vec zero = simd::broadcast(q.zero);
    vec z[n * kVectors];
    for (int i = 0; i < n * kVectors; ++i) z[i] = y[i];
    quantize_vectors<n * kVectors, 1, true>(&to, z, &scale, &reciprocal, &zero, simd::broadcast(q.greatest));
  }
};

// To floats, with a residual added.
struct ToSum {
  const float* residual;
  float* out;
  int64_t channels;

  template <int n>
  DFQVIT_INLINE void put(const vec* y, int64_t r, int64_t c) const {
    for (int i = 0; i < n * kVectors; ++i) {
      const int64_t at = r * channels + c + i * simd::kLanes;
      simd::store(out + at, simd::add(y[i], simd::load(residual + at)));
    }
  }
  DFQVIT_INLINE void put_some(const vec* y, int64_t r, int64_t c, int64_t some) const {
    float floats[kOutputs];
    for (int v = 0; v < kVectors; ++v) simd::store(floats + v * simd::kLanes, y[v]);
    const int64_t at = r * channels + c;
    for (int64_t i = 0; i < some; ++i) out[at + i] = floats[i] + residual[at + i];
  }
};

// The rows of a norm: where their values stand as floats, and what normalises them.
struct Normed {
  float* line;
  vec mean, inverse;
};

// n rows from x on, their lines in `scratch`. False when a mean is not finite.
template <int n, class T>
DFQVIT_INLINE bool statistics(const T* x, const Norm& norm, float* scratch, Normed* rows) {
  const int64_t channels = norm.channels, line = norm.line(), whole = channels / kOutputs * kOutputs;
  const float count = static_cast<float>(channels);
  vec sums[n][kVectors], squares[n][kVectors];
#pragma GCC unroll 4
  DFQVIT_EACH {
    rows[i].line = scratch + i * line;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[i][v] = squares[i][v] = simd::broadcast(0.0f);
  }
  for (int64_t c = 0; c < whole; c += kOutputs) {
#pragma GCC unroll 4
    DFQVIT_EACH {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const vec value = simd::load(x + i * channels + c + v * simd::kLanes);
        simd::store(rows[i].line + c + v * simd::kLanes, value);
        sums[i][v] = simd::add(sums[i][v], value);
      }
    }
  }
  if (whole < channels) {  // an incomplete run
    DFQVIT_EACH {
      T last[kOutputs];
      std::memset(static_cast<void*>(last), 0, sizeof(last));
      std::memcpy(static_cast<void*>(last), x + i * channels + whole, (channels - whole) * sizeof(T));
      for (int v = 0; v < kVectors; ++v) {
        const vec value = simd::load(last + v * simd::kLanes);
        simd::store(rows[i].line + whole + v * simd::kLanes, value);
        sums[i][v] = simd::add(sums[i][v], value);
      }
    }
  }
  bool finite = true;
  DFQVIT_EACH {
    const float average = sum_of(sums[i]) / count;
    finite &= std::isfinite(average);
    for (int64_t c = channels; c < line; ++c) rows[i].line[c] = average;  // adds nothing to the squares
    rows[i].mean = simd::broadcast(average);
  }
  for (int64_t c = 0; c < line; c += kOutputs) {
#pragma GCC unroll 4
    DFQVIT_EACH {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const vec d = simd::sub(simd::load(rows[i].line + c + v * simd::kLanes), rows[i].mean);
        squares[i][v] = simd::add(squares[i][v], simd::mul(d, d));
      }
    }
  }
  DFQVIT_EACH rows[i].inverse = simd::broadcast(1.0f / std::sqrt(sum_of(squares[i]) / count + norm.eps));
  return finite;
}

template <class T, class To>
DFQVIT_TARGET bool norm_rows(const T* x, int64_t rows, const Norm& norm, const To& to, float* scratch) {
  const int64_t channels = norm.channels, whole = channels / kOutputs * kOutputs, rest = channels - whole;
  float weight[kOutputs] = {}, bias[kOutputs] = {};  // of the last, incomplete run
  std::memcpy(weight, norm.weight + whole, rest * sizeof(float));
  std::memcpy(bias, norm.bias + whole, rest * sizeof(float));
  bool finite = true;
  for (int64_t first = 0; first < rows;) {
    const int together = first + kNormedTogether <= rows ? kNormedTogether : 1;
    Normed normed[kNormedTogether];
    finite &= together == kNormedTogether ? statistics<kNormedTogether>(x + first * channels, norm, scratch, normed)
                                          : statistics<1>(x + first * channels, norm, scratch, normed);
    for (const Normed* row = normed; row < normed + together; ++row, ++first) {
      vec y[4 * kVectors];
      int64_t c = 0;
      for (; c + 4 * kOutputs <= whole; c += 4 * kOutputs) {
        normalise<4>(row->line + c, norm.weight + c, norm.bias + c, row->mean, row->inverse, y);
        to.template put<4>(y, first, c);
      }
      for (; c < whole; c += kOutputs) {
        normalise<1>(row->line + c, norm.weight + c, norm.bias + c, row->mean, row->inverse, y);
        to.template put<1>(y, first, c);
      }
      if (rest > 0) {
        normalise<1>(row->line + whole, weight, bias, row->mean, row->inverse, y);
        to.put_some(y, first, whole, rest);
      }
    }
  }
  return finite;
}

DFQVIT_TARGET inline bool norm(const void* x, Type type, int64_t rows, const Norm& norm, uint8_t* out, int64_t stride,
                               float* scratch) {
  const ToBytes to{norm.out, out, stride};
  if (type == Type::bf16) {
    return norm_rows(static_cast<const ::dfqvit::simd::bfloat*>(x), rows, norm, to, scratch);
  }
  if (type == Type::f16) {
    return norm_rows(static_cast<const ::dfqvit::simd::half*>(x), rows, norm, to, scratch);
  }
  return norm_rows(static_cast<const float*>(x), rows, norm, to, scratch);
}

DFQVIT_TARGET inline void norm_and_add(const float* x, int64_t rows, const Norm& norm, const float* residual,
                                       float* out, float* scratch) {
  norm_rows(x, rows, norm, ToSum{residual, out, norm.channels}, scratch);
}

#undef DFQVIT_EACH
#undef DFQVIT_INLINE
}  // namespace DFQVIT_PATH
}  // namespace quant
}  // namespace dfqvit
