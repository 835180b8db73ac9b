// dfqvit_cuda::fake_quantize and its backward: memory for the kernel of fake_quantize_kernels.cu.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "dfqvit/build.h"
#include "dfqvit/fake_quantize_launch.h"
#include "dfqvit/torch_dispatch_cuda.h"

namespace dfqvit {
namespace {

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
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  DFQVIT_DISPATCH_FLOATS(input.scalar_type(), "fake_quantize", [&] {
    using Element = DeviceType<scalar_t>;
    C10_CUDA_CHECK(
        launch_fake_quantize(grad ? reinterpret_cast<const Element*>(grad_input.const_data_ptr<scalar_t>()) : nullptr,
                             reinterpret_cast<const Element*>(input.const_data_ptr<scalar_t>()),
                             reinterpret_cast<Element*>(output.mutable_data_ptr<scalar_t>()),
                             scales.const_data_ptr<float>(), zero_points.const_data_ptr<float>(), n, scales.numel(),
                             inner, static_cast<float>(quant_min), static_cast<float>(quant_max), stream));
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

TORCH_LIBRARY_IMPL(DFQVIT_OPERATORS(cuda), CUDA, m) {
  m.impl("fake_quantize", &dfqvit::fake_quantize);
  m.impl("fake_quantize_backward", &dfqvit::fake_quantize_backward);
}
