// What csrc/cuda/fake_quantize_kernels.cu offers to the binding. No torch headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dfqvit {

// y = x rounded to its grid and back, or with `grad` the gradient that it lets through; n values, all on the device. x
// is [outer, channels, inner] in memory. T is float, __half or __nv_bfloat16.
template <typename T>
cudaError_t launch_fake_quantize(const T* grad, const T* x, T* y, const float* scale, const float* zero_point,
                                 int64_t n, int64_t channels, int64_t inner, float quant_min, float quant_max,
                                 cudaStream_t stream);

}  // namespace dfqvit
