// The CUDA kernel of fake_quantize, on raw pointers. Bound by memory: the floor is one read of x (and of grad) and one
// write. x is [outer, channels, inner] in memory, with a scale and a zero point for each channel; 64-bit indices
// throughout. No torch headers.
#pragma once

#include "dfqvit/device_floats.cuh"
#include "dfqvit/fake_quantize.h"

namespace dfqvit {

constexpr int kFakeThreads = 256;
constexpr int kFakePerThread = 4;

template <typename T, bool kBackward>
__global__ void __launch_bounds__(kFakeThreads)
    fake_quantize_kernel(const T* __restrict__ grad, const T* __restrict__ x, T* __restrict__ y,
                         const float* __restrict__ scale, const float* __restrict__ zero_point, int64_t n,
                         int64_t channels, int64_t inner, float quant_min, float quant_max) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kFakeThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kFakeThreads + threadIdx.x;
  const float first_scale = scale[0], first_zero = zero_point[0];
  for (; i < n; i += step) {
    const int64_t channel = channels == 1 ? 0 : (i / inner) % channels;
    const float s = channels == 1 ? first_scale : scale[channel];
    const float z = channels == 1 ? first_zero : zero_point[channel];
    const float value = to_float(x[i]);
    from_float(kBackward ? fake_quantize_grad(to_float(grad[i]), value, s, z, quant_min, quant_max)
                         : fake_quantize_value(value, s, z, quant_min, quant_max),
               y + i);
  }
}

inline int64_t fake_quantize_blocks(int64_t n) {
  const int64_t wanted = (n + kFakeThreads * kFakePerThread - 1) / (kFakeThreads * kFakePerThread);
  return wanted < (1 << 20) ? wanted : 1 << 20;
}

}  // namespace dfqvit
