// The body of the layer_norm_quantize kernels, compiled once for each CPU path: the includer sets DFQVIT_PATH,
// DFQVIT_SIMD and DFQVIT_TARGET as for quant_linear_body.h, whose rounding it uses. So no include guard.
//
// All paths give the same bits: sums are in 16 partial sums whatever the vectors' size, and nothing is fused.

namespace dfqvit {
namespace quant {
namespace DFQVIT_PATH {

#define DFQVIT_INLINE DFQVIT_TARGET inline __attribute__((always_inline))

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

template <class T, class To>
DFQVIT_TARGET bool norm_rows(const T* x, int64_t rows, const Norm& norm, const To& to, float* line) {
  const int64_t channels = norm.channels, whole = channels / kOutputs * kOutputs, rest = channels - whole;
  const float count = static_cast<float>(channels);
  float weight[kOutputs] = {}, bias[kOutputs] = {};  // of the last, incomplete run
  std::memcpy(weight, norm.weight + whole, rest * sizeof(float));
  std::memcpy(bias, norm.bias + whole, rest * sizeof(float));
  bool finite = true;
  for (int64_t r = 0; r < rows; ++r, x += channels) {
    vec sums[kVectors], squares[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = squares[v] = simd::broadcast(0.0f);
    if (rest > 0) {
      T last[kOutputs];
      std::memset(static_cast<void*>(last), 0, sizeof(last));
      std::memcpy(static_cast<void*>(last), x + whole, rest * sizeof(T));
      for (int at = 0; at < kOutputs; at += simd::kLanes) simd::store(line + whole + at, simd::load(last + at));
    }
    for (int64_t c = 0; c < whole; c += kOutputs) {
      for (int v = 0; v < kVectors; ++v) {
        const vec value = simd::load(x + c + v * simd::kLanes);
        simd::store(line + c + v * simd::kLanes, value);
        sums[v] = simd::add(sums[v], value);
      }
    }
    for (int v = 0; v < kVectors && rest > 0; ++v) {
      sums[v] = simd::add(sums[v], simd::load(line + whole + v * simd::kLanes));
    }
    const float average = sum_of(sums) / count;
    finite &= std::isfinite(average);
    for (int64_t c = channels; c < norm.line(); ++c) line[c] = average;  // adds nothing to the squares
    const vec mean = simd::broadcast(average);
    for (int64_t c = 0; c < channels; c += kOutputs) {
      for (int v = 0; v < kVectors; ++v) {
        const vec d = simd::sub(simd::load(line + c + v * simd::kLanes), mean);
        squares[v] = simd::add(squares[v], simd::mul(d, d));
      }
    }
    const vec inverse = simd::broadcast(1.0f / std::sqrt(sum_of(squares) / count + norm.eps));
    vec y[4 * kVectors];
    int64_t c = 0;
    for (; c + 4 * kOutputs <= whole; c += 4 * kOutputs) {
      normalise<4>(line + c, norm.weight + c, norm.bias + c, mean, inverse, y);
      to.template put<4>(y, r, c);
    }
    for (; c < whole; c += kOutputs) {
      normalise<1>(line + c, norm.weight + c, norm.bias + c, mean, inverse, y);
      to.template put<1>(y, r, c);
    }
    if (rest > 0) {
      normalise<1>(line + whole, weight, bias, mean, inverse, y);
      to.put_some(y, r, whole, rest);
    }
  }
  return finite;
}

DFQVIT_TARGET inline bool norm(const void* x, Type type, int64_t rows, const Norm& norm, uint8_t* out, int64_t stride,
                               float* line) {
  const ToBytes to{norm.out, out, stride};
  if (type == Type::bf16) {
    return norm_rows(static_cast<const ::dfqvit::simd::bfloat*>(x), rows, norm, to, line);
  }
  if (type == Type::f16) {
    return norm_rows(static_cast<const ::dfqvit::simd::half*>(x), rows, norm, to, line);
  }
  return norm_rows(static_cast<const float*>(x), rows, norm, to, line);
}

DFQVIT_TARGET inline void norm_and_add(const float* x, int64_t rows, const Norm& norm, const float* residual,
                                       float* out, float* line) {
  norm_rows(x, rows, norm, ToSum{residual, out, norm.channels}, line);
}

#undef DFQVIT_INLINE
}  // namespace DFQVIT_PATH
}  // namespace quant
}  // namespace dfqvit
