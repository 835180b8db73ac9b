// dfqvit_cuda::fake_quantize and its backward. Bound by memory: the floor is one read of x (and of grad) and one write.
// x is [outer, channels, inner] in memory, with a scale and a zero point for each channel; 64-bit indices throughout.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "dfqvit/fake_quantize.h"
#include "dfqvit/torch_dispatch.h"

namespace dfqvit {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 4;

template <typename T, bool kBackward>
__global__ void __launch_bounds__(kThreads)
    fake_quantize_kernel(const T* __restrict__ grad, const T* __restrict__ x, T* __restrict__ y,
                         const float* __restrict__ scale, const float* __restrict__ zero_point, int64_t n,
                         int64_t channels, int64_t inner, float quant_min, float quant_max) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const float first_scale = scale[0], first_zero = zero_point[0];
  for (; i < n; i += step) {
    const int64_t channel = channels == 1 ? 0 : (i / inner) % channels;
    const float s = channels == 1 ? first_scale : scale[channel];
    const float z = channels == 1 ? first_zero : zero_point[channel];
    const float value = static_cast<float>(x[i]);
    y[i] = kBackward
               ? static_cast<T>(fake_quantize_grad(static_cast<float>(grad[i]), value, s, z, quant_min, quant_max))
               : static_cast<T>(fake_quantize_value(value, s, z, quant_min, quant_max));
  }
}

at::Tensor launch(const at::Tensor* grad, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                  int64_t quant_min, int64_t quant_max, int64_t axis) {
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor input = x.contiguous();
  const at::Tensor grad_input = grad ? grad->contiguous() : at::Tensor();
  const at::Tensor scales = scale.contiguous();
  const at::Tensor zero_points = zero_point.contiguous();
  at::Tensor output = at::empty_like(input);
  const int64_t n = input.numel();
  if (n == 0) return output;
  int64_t inner = 1;
  for (int64_t d = axis + 1; d < input.dim(); ++d) inner *= input.size(d);
  const int64_t wanted = (n + kThreads * kPerThread - 1) / (kThreads * kPerThread);
  const int blocks = static_cast<int>(wanted < (1 << 20) ? wanted : (1 << 20));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  DFQVIT_DISPATCH_FLOATS(input.scalar_type(), "fake_quantize", [&] {
    const auto kernel = grad ? fake_quantize_kernel<scalar_t, true> : fake_quantize_kernel<scalar_t, false>;
    kernel<<<blocks, kThreads, 0, stream>>>(
        grad ? grad_input.const_data_ptr<scalar_t>() : nullptr, input.const_data_ptr<scalar_t>(),
        output.mutable_data_ptr<scalar_t>(), scales.const_data_ptr<float>(), zero_points.const_data_ptr<float>(), n,
        scales.numel(), inner, static_cast<float>(quant_min), static_cast<float>(quant_max));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

at::Tensor fake_quantize(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point, int64_t quant_min,
                         int64_t quant_max, int64_t axis) {
  return launch(nullptr, x, scale, zero_point, quant_min, quant_max, axis);
}

at::Tensor fake_quantize_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
                                  const at::Tensor& zero_point, int64_t quant_min, int64_t quant_max, int64_t axis) {
  return launch(&grad, x, scale, zero_point, quant_min, quant_max, axis);
}

}  // namespace
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(dfqvit_cuda, CUDA, m) {
  m.impl("fake_quantize", &dfqvit::fake_quantize);
  m.impl("fake_quantize_backward", &dfqvit::fake_quantize_backward);
}
