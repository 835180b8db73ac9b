// dfqvit_cpu::quantize_heads. Here: the arguments as the kernel wants them, and the division of tokens among threads;
// the kernel is in dfqvit/quantize_heads_body.h.
#include "dfqvit/quantize_heads.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <array>
#include <atomic>

#include "dfqvit/build.h"
#include "dfqvit/layers.h"
#include "dfqvit/parallel.h"
#include "dfqvit/results.h"
#include "dfqvit/thread_memory.h"

namespace dfqvit {
namespace quant {
namespace {

// float32, with the channels of a head side by side.
at::Tensor readable(const at::Tensor& tensor) {
  const at::Tensor floats = tensor.to(at::kFloat);
  return floats.stride(-1) == 1 || floats.size(-1) == 1 ? floats : floats.contiguous();
}

at::Tensor quantize_heads(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& in_scale,
                          const at::Tensor& in_zero, int64_t bits, const OptionalTensor& rope, bool half) {
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), depth = q.size(3), width = heads * depth;
  at::Tensor result = empty_result({batch, tokens, 3 * width}, at::kByte);
  if (result.numel() == 0) return result;
  const std::array<at::Tensor, 3> parts{readable(q), readable(k), readable(v)};
  const at::Tensor turns = rope ? rope->to(at::kFloat).contiguous() : at::Tensor();
  const int64_t turned = rope ? turns.size(-2) : 0;  // the last tokens of each image
  const int64_t turn_stride = rope && turns.dim() == 3 ? turned * 2 * depth : 0;
  const float* first_turn = rope ? turns.const_data_ptr<float>() : nullptr;
  const at::Tensor scales = in_scale.contiguous(), zeros = in_zero.contiguous();
  TORCH_CHECK_VALUE(scales.numel() == 3 && zeros.numel() == 3, "in_scale and in_zero had ", scales.numel(), " and ",
                    zeros.numel(), " values; they must have 3, for q, k and v");
  Quantizer quantizers[3];
  bool ordinary = true;
  for (int i = 0; i < 3; ++i) {
    const float step = scales.const_data_ptr<float>()[i];
    quantizers[i] = {step, 1.0f / step, zeros.const_data_ptr<float>()[i], static_cast<float>((1 << bits) - 1)};
    ordinary = ordinary && ordinary_divisor(step);
  }
  const HeadsKernel kernel = heads_kernel_for(ordinary ? active_isa() : Isa::portable);
  uint8_t* to = result.mutable_data_ptr<uint8_t>();
  std::atomic<bool> finite{true};
  parallel_ranges(batch * tokens, std::max<int64_t>(1, 16384 / (3 * width)), [&](int64_t begin, int64_t end) {
    float* line = reinterpret_cast<float*>(thread_memory(width * sizeof(float)));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / tokens, token = row % tokens, turn = token - (tokens - turned);
      for (int i = 0; i < 3; ++i) {
        const at::Tensor& part = parts[i];
        const float* values = part.const_data_ptr<float>() + image * part.stride(0) + token * part.stride(2);
        const float* sines = i < 2 && turn >= 0 && turned > 0 ? first_turn + turn * 2 * depth : nullptr;
        if (!kernel({values, heads, depth, part.stride(1), false}, {sines, turn_stride, half}, quantizers[i],
                    to + (3 * row + i) * width, line)) {
          finite = false;
        }
      }
    }
  });
  TORCH_CHECK_VALUE(finite, "q, k, v or rope held NaN or Inf; every value must be finite");
  return result;
}

}  // namespace
}  // namespace quant
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(DFQVIT_OPERATORS(cpu), CPU, m) {
  m.impl("quantize_heads", &dfqvit::quant::quantize_heads);
}
