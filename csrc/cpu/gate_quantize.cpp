// dfqvit_cpu::gate_quantize. Here: the arguments as the kernel wants them, and the division of rows among threads; the
// kernel is in dfqvit/gate_quantize_body.h.
#include "dfqvit/gate_quantize.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>

#include "dfqvit/build.h"
#include "dfqvit/layers.h"
#include "dfqvit/parallel.h"
#include "dfqvit/results.h"

namespace dfqvit {
namespace quant {

GateLayer::GateLayer(const at::Tensor& scale, const at::Tensor& zero_point, int64_t bits, int64_t channels,
                     c10::string_view activation) {
  TORCH_CHECK_VALUE((scale.numel() == 1 || scale.numel() == channels) && scale.scalar_type() == at::kFloat,
                    "scale had ", scale.numel(), " values of ", scale.scalar_type(), "; it must have 1 or ", channels,
                    " of float32");
  const at::Tensor given = scale.contiguous();
  const int64_t padded = (channels + kGateStep - 1) / kGateStep * kGateStep;
  steps = at::empty({2, padded}, at::kFloat);
  float *to = steps.mutable_data_ptr<float>(), *inverse = to + padded;
  const float* from = given.const_data_ptr<float>();
  ordinary = true;
  for (int64_t i = 0; i < padded; ++i) {
    to[i] = i < channels ? scale_value("scale", from[given.numel() == 1 ? 0 : i]) : 1.0f;
    inverse[i] = 1.0f / to[i];
    ordinary = ordinary && ordinary_divisor(to[i]);
  }
  const int64_t greatest = (1 << bits) - 1;
  const float zero = whole_value("zero_point", scalar_of("zero_point", zero_point), greatest);
  gate = {channels, {}, 0.0f, to, inverse, zero, static_cast<float>(greatest), nullptr};
  set_activation(activation, gate.activation, gate.slope);
}

namespace {

// [rows, channels] float32 with the channels side by side: a view where there is one.
at::Tensor rows_of(const at::Tensor& part) {
  const at::Tensor rows = part.to(at::kFloat).reshape({-1, part.size(-1)});
  return rows.stride(1) == 1 || rows.size(1) == 1 ? rows : rows.contiguous();
}

at::Tensor gate_quantize(const at::Tensor& gate, const at::Tensor& value, const at::Tensor& scale,
                         const at::Tensor& zero_point, int64_t bits, c10::string_view activation) {
  TORCH_CHECK_VALUE(gate.dim() > 0 && gate.sizes() == value.sizes(), "value had shape ", value.sizes(),
                    "; it must be that of gate, ", gate.sizes());
  at::Tensor result = empty_result(gate.sizes(), at::kByte);
  if (result.numel() == 0) return result;
  const int64_t channels = gate.size(-1);
  const GateLayer layer(scale, zero_point, bits, channels, activation);
  const GateKernel kernel = gate_kernel_for(layer.ordinary ? active_isa() : Isa::portable);
  const at::Tensor gates = rows_of(gate), values = rows_of(value);
  const float *g = gates.const_data_ptr<float>(), *v = values.const_data_ptr<float>();
  uint8_t* to = result.mutable_data_ptr<uint8_t>();
  std::atomic<bool> finite{true};
  parallel_ranges(gates.size(0), std::max<int64_t>(1, 8192 / channels), [&](int64_t begin, int64_t end) {
    if (!kernel(g + begin * gates.stride(0), gates.stride(0), v + begin * values.stride(0), values.stride(0),
                end - begin, layer.gate, to + begin * channels, channels)) {
      finite = false;
    }
  });
  TORCH_CHECK_VALUE(finite, "gate or value held NaN or Inf; every value must be finite");
  return result;
}

}  // namespace
}  // namespace quant
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(DFQVIT_OPERATORS(cpu), CPU, m) {
  m.impl("gate_quantize", &dfqvit::quant::gate_quantize);
}
