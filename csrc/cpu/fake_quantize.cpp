// dfqvit_cpu::fake_quantize and its backward. One pass over memory: reads x (and grad), writes y; the arithmetic is in
// dfqvit/fake_quantize.h. x is [outer, channels, inner] in memory, with a scale and a zero point for each channel.
#include "dfqvit/fake_quantize.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "dfqvit/build.h"
#include "dfqvit/isa.h"
#include "dfqvit/parallel.h"
#include "dfqvit/torch_dispatch.h"

namespace dfqvit {
namespace {

struct Range {
  float quant_min, quant_max;
};

// A run of values that share one scale. `grad` is null in the forward pass.
template <typename T>
inline __attribute__((always_inline)) void run_body(const T* grad, const T* x, T* y, int64_t n, float scale,
                                                    float zero_point, Range range) {
  if (grad == nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      y[i] = static_cast<T>(
          fake_quantize_value(static_cast<float>(x[i]), scale, zero_point, range.quant_min, range.quant_max));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      y[i] = static_cast<T>(fake_quantize_grad(static_cast<float>(grad[i]), static_cast<float>(x[i]), scale, zero_point,
                                               range.quant_min, range.quant_max));
    }
  }
}

template <typename T>
DFQVIT_TARGET_AVX512 void run_avx512(const T* grad, const T* x, T* y, int64_t n, float scale, float zero_point,
                                     Range range) {
  run_body(grad, x, y, n, scale, zero_point, range);
}

template <typename T>
DFQVIT_TARGET_AVX2 void run_avx2(const T* grad, const T* x, T* y, int64_t n, float scale, float zero_point,
                                 Range range) {
  run_body(grad, x, y, n, scale, zero_point, range);
}

template <typename T>
void run_portable(const T* grad, const T* x, T* y, int64_t n, float scale, float zero_point, Range range) {
  run_body(grad, x, y, n, scale, zero_point, range);
}

template <typename T>
auto run_for(Isa isa) {
  return version_for(isa, run_avx512<T>, run_avx2<T>, run_portable<T>);
}

at::Tensor launch(const at::Tensor* grad, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                  int64_t quant_min, int64_t quant_max, int64_t axis) {
  const at::Tensor input = x.contiguous();
  const at::Tensor grad_input = grad ? grad->contiguous() : at::Tensor();
  const at::Tensor scales = scale.contiguous();
  const at::Tensor zero_points = zero_point.contiguous();
  at::Tensor output = at::empty_like(input);
  const int64_t channels = scales.numel();
  int64_t inner = 1;
  for (int64_t d = axis + 1; d < input.dim(); ++d) inner *= input.size(d);
  if (channels == 1) inner = input.numel();
  const float* scale_data = scales.const_data_ptr<float>();
  const float* zero_data = zero_points.const_data_ptr<float>();
  const Range range{static_cast<float>(quant_min), static_cast<float>(quant_max)};

  DFQVIT_DISPATCH_FLOATS(input.scalar_type(), "fake_quantize", [&] {
    const auto run = run_for<scalar_t>(active_isa());
    const scalar_t* grad_data = grad ? grad_input.const_data_ptr<scalar_t>() : nullptr;
    const scalar_t* x_data = input.const_data_ptr<scalar_t>();
    scalar_t* y_data = output.mutable_data_ptr<scalar_t>();
    parallel_ranges(input.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
      while (begin < end) {  // runs of one channel each
        const int64_t channel = (begin / inner) % channels;
        const int64_t stop = std::min(end, (begin / inner + 1) * inner);
        run(grad_data ? grad_data + begin : nullptr, x_data + begin, y_data + begin, stop - begin, scale_data[channel],
            zero_data[channel], range);
        begin = stop;
      }
    });
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

TORCH_LIBRARY_IMPL(DFQVIT_OPERATORS(cpu), CPU, m) {
  m.impl("fake_quantize", &dfqvit::fake_quantize);
  m.impl("fake_quantize_backward", &dfqvit::fake_quantize_backward);
}
