// dfqvit_cpu::layer_norm_quantize. Here: the arguments as the kernel wants them, and the division of work among
// threads; the kernel is in dfqvit/layer_norm_quantize_body.h.
#include "dfqvit/layer_norm_quantize.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <atomic>

#include "dfqvit/build.h"
#include "dfqvit/layers.h"
#include "dfqvit/parallel.h"
#include "dfqvit/results.h"
#include "dfqvit/thread_memory.h"

namespace dfqvit {
namespace quant {

NormLayer::NormLayer(const at::Tensor& weight, const at::Tensor& bias, double eps, const at::Tensor& scale,
                     const at::Tensor& zero_point, int64_t bits)
    : gain(weight.contiguous().detach()), offset(bias.contiguous().detach()) {
  TORCH_CHECK_VALUE(gain.numel() == offset.numel(), "bias had ", offset.numel(), " values; weight has ", gain.numel());
  check_finite("weight", gain.const_data_ptr<float>(), gain.numel());
  check_finite("bias", offset.const_data_ptr<float>(), offset.numel());
  const float step = scalar_of("scale", scale);
  norm = {gain.const_data_ptr<float>(),
          offset.const_data_ptr<float>(),
          gain.numel(),
          static_cast<float>(eps),
          {step, 1.0f / step, scalar_of("zero_point", zero_point), static_cast<float>((1 << bits) - 1)}};
  ordinary = ordinary_divisor(step);
}

namespace {

at::Tensor layer_norm_quantize(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps,
                               const at::Tensor& scale, const at::Tensor& zero_point, int64_t bits) {
  const at::Tensor input = x.contiguous();
  at::Tensor output = empty_result(input.sizes(), at::kByte);
  if (input.numel() == 0) return output;
  const NormLayer layer(weight, bias, eps, scale, zero_point, bits);
  TORCH_CHECK_VALUE(layer.norm.channels == input.size(-1), "weight had ", layer.norm.channels, " values; x has ",
                    input.size(-1), " channels");
  const int64_t channels = layer.norm.channels;
  const NormKernels kernels = norm_kernels_for(layer.ordinary ? active_isa() : Isa::portable);
  const char* from = static_cast<const char*>(input.const_data_ptr());
  uint8_t* to = output.mutable_data_ptr<uint8_t>();
  const int64_t grain = std::max<int64_t>(1, 16384 / channels);
  std::atomic<bool> finite{true};
  parallel_ranges(input.numel() / channels, grain, [&](int64_t begin, int64_t end) {
    if (!kernels.quantize(from + begin * channels * input.element_size(), type_of(input.scalar_type()), end - begin,
                          layer.norm, to + begin * channels, channels,
                          reinterpret_cast<float*>(thread_memory(layer.norm.scratch() * sizeof(float))))) {
      finite = false;
    }
  });
  if (!finite) check_finite("x", input);  // or the sum of a row overflowed
  return output;
}

}  // namespace
}  // namespace quant
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(DFQVIT_OPERATORS(cpu), CPU, m) {
  m.impl("layer_norm_quantize", &dfqvit::quant::layer_norm_quantize);
}
