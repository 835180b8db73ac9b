// dfqvit_cpu::layer_norm_quantize: LayerNorm and the rounding to integers in one pass, each row from the cache it was
// read into. Sums are in float32, in 16 partial sums whatever the path, so that all paths agree.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "dfqvit/isa.h"
#include "dfqvit/torch_dispatch.h"

namespace dfqvit {
namespace {

constexpr int kLanes = 16;

struct Norm {
  const float* weight;
  const float* bias;
  int64_t channels;
  float eps, scale, zero_point, greatest;
};

// The sum of f(i) over the channels, in a fixed order.
template <typename F>
inline __attribute__((always_inline)) float sum_of(int64_t channels, const F& f) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= channels; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) lanes[l] += f(i + l);
  }
  for (int l = 0; i < channels; ++i, ++l) lanes[l] += f(i);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int l = 0; l < step; ++l) lanes[l] += lanes[l + step];
  }
  return lanes[0];
}

// Rounds half to even for |a| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
inline float rounded(float a) {
  constexpr float kRound = 12582912.0f;
  return (a + kRound) - kRound;
}

template <typename T>
inline __attribute__((always_inline)) void rows_body(const T* x, uint8_t* y, float* line, int64_t rows, Norm norm) {
  for (int64_t r = 0; r < rows; ++r, x += norm.channels, y += norm.channels) {
    const int64_t channels = norm.channels;
    for (int64_t i = 0; i < channels; ++i) line[i] = static_cast<float>(x[i]);
    const float mean = sum_of(channels, [&](int64_t i) { return line[i]; }) / static_cast<float>(channels);
    const float squares = sum_of(channels, [&](int64_t i) {
      const float d = line[i] - mean;
      return d * d;
    });
    const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(channels) + norm.eps);
    for (int64_t i = 0; i < channels; ++i) {
      const float value = (line[i] - mean) * inverse * norm.weight[i] + norm.bias[i];
      const float ratio = std::min(std::max(value / norm.scale, -1048576.0f), 1048576.0f);
      const float q = rounded(ratio) + norm.zero_point;
      y[i] = static_cast<uint8_t>(static_cast<int32_t>(std::min(std::max(q, 0.0f), norm.greatest)));
    }
  }
}

template <typename T>
DFQVIT_TARGET_AVX512 void rows_avx512(const T* x, uint8_t* y, float* line, int64_t rows, Norm norm) {
  rows_body(x, y, line, rows, norm);
}
template <typename T>
DFQVIT_TARGET_AVX2 void rows_avx2(const T* x, uint8_t* y, float* line, int64_t rows, Norm norm) {
  rows_body(x, y, line, rows, norm);
}
template <typename T>
void rows_portable(const T* x, uint8_t* y, float* line, int64_t rows, Norm norm) {
  rows_body(x, y, line, rows, norm);
}
template <typename T>
auto rows_for(Isa isa) {
  return isa >= Isa::avx512 ? rows_avx512<T> : isa == Isa::avx2 ? rows_avx2<T> : rows_portable<T>;
}

at::Tensor layer_norm_quantize(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps,
                               const at::Tensor& scale, const at::Tensor& zero_point, int64_t bits) {
  const at::Tensor input = x.contiguous();
  const at::Tensor gain = weight.contiguous(), offset = bias.contiguous();
  at::Tensor output = at::empty(input.sizes(), input.options().dtype(at::kByte));
  const int64_t channels = input.size(-1);
  if (input.numel() == 0) return output;
  const Norm norm{gain.const_data_ptr<float>(),
                  offset.const_data_ptr<float>(),
                  channels,
                  static_cast<float>(eps),
                  *scale.const_data_ptr<float>(),
                  *zero_point.const_data_ptr<float>(),
                  static_cast<float>((1 << bits) - 1)};
  uint8_t* to = output.mutable_data_ptr<uint8_t>();
  DFQVIT_DISPATCH_FLOATS(input.scalar_type(), "layer_norm_quantize", [&] {
    const scalar_t* from = input.const_data_ptr<scalar_t>();
    const auto run = rows_for<scalar_t>(active_isa());
    const int64_t grain = std::max<int64_t>(1, 16384 / channels);
    at::parallel_for(0, input.numel() / channels, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> line(channels);
      run(from + begin * channels, to + begin * channels, line.data(), end - begin, norm);
    });
  });
  return output;
}

}  // namespace
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(dfqvit_cpu, CPU, m) {
  m.impl("layer_norm_quantize", &dfqvit::layer_norm_quantize);
}
