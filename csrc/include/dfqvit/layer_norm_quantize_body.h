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

// n runs of 16 channels: (line - mean) * inverse * weight + bias, quantized.
template <int n>
DFQVIT_INLINE void normalise(const float* line, const float* weight, const float* bias, vec mean, vec inverse,
                             const Quantizer& q, uint8_t* out) {
  constexpr int count = n * kVectors;
  const vec scale = simd::broadcast(q.scale), reciprocal = simd::broadcast(q.reciprocal);
  const vec zero = simd::broadcast(q.zero);
  vec y[count];
  for (int i = 0; i < count; ++i) {
    const int at = i * simd::kLanes;
    const vec normed = simd::mul(simd::sub(simd::load(line + at), mean), inverse);
    y[i] = simd::add(simd::mul(normed, simd::load(weight + at)), simd::load(bias + at));
  }
  quantize_vectors<count, 1, true>(&out, y, &scale, &reciprocal, &zero, simd::broadcast(q.greatest));
}

template <class T>
DFQVIT_TARGET void norm_rows(const T* x, int64_t rows, const Norm& norm, uint8_t* out, int64_t stride, float* line) {
  const int64_t channels = norm.channels, whole = channels / kOutputs * kOutputs, rest = channels - whole;
  const float count = static_cast<float>(channels);
  float weight[kOutputs] = {}, bias[kOutputs] = {};  // of the last, incomplete run
  std::memcpy(weight, norm.weight + whole, rest * sizeof(float));
  std::memcpy(bias, norm.bias + whole, rest * sizeof(float));
  for (int64_t r = 0; r < rows; ++r, x += channels, out += stride) {
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
    for (int64_t c = channels; c < norm.line(); ++c) line[c] = average;  // adds nothing to the squares
    const vec mean = simd::broadcast(average);
    for (int64_t c = 0; c < channels; c += kOutputs) {
      for (int v = 0; v < kVectors; ++v) {
        const vec d = simd::sub(simd::load(line + c + v * simd::kLanes), mean);
        squares[v] = simd::add(squares[v], simd::mul(d, d));
      }
    }
    const vec inverse = simd::broadcast(1.0f / std::sqrt(sum_of(squares) / count + norm.eps));
    int64_t c = 0;
    for (; c + 4 * kOutputs <= whole; c += 4 * kOutputs) {
      normalise<4>(line + c, norm.weight + c, norm.bias + c, mean, inverse, norm.out, out + c);
    }
    for (; c < whole; c += kOutputs) {
      normalise<1>(line + c, norm.weight + c, norm.bias + c, mean, inverse, norm.out, out + c);
    }
    if (rest > 0) {
      uint8_t bytes[kOutputs];
      normalise<1>(line + whole, weight, bias, mean, inverse, norm.out, bytes);
      std::memcpy(out + whole, bytes, rest);
    }
  }
}

DFQVIT_TARGET inline void norm(const void* x, Type type, int64_t rows, const Norm& norm, uint8_t* out, int64_t stride,
                               float* line) {
  if (type == Type::bf16) {
    norm_rows(static_cast<const ::dfqvit::simd::bfloat*>(x), rows, norm, out, stride, line);
  } else if (type == Type::f16) {
    norm_rows(static_cast<const ::dfqvit::simd::half*>(x), rows, norm, out, stride, line);
  } else {
    norm_rows(static_cast<const float*>(x), rows, norm, out, stride, line);
  }
}

#undef DFQVIT_INLINE
}  // namespace DFQVIT_PATH
}  // namespace quant
}  // namespace dfqvit
