// dfqvit_cuda::quant_attention: memory for the kernel of quant_attention_kernels.cu. Scales and zero points are read on
// the device only, so nothing waits for the GPU. Values are not checked here.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <optional>

#include "dfqvit/build.h"
#include "dfqvit/quant_attention_launch.h"

namespace dfqvit {
namespace quant {
namespace attention {
namespace {

using Optional = std::optional<at::Tensor>;

at::Tensor quant_attention(const at::Tensor& qkv, int64_t heads, const at::Tensor& in_scale, const at::Tensor& in_zero,
                           double scale, const Optional& bias, const Optional& mask, const Optional& index,
                           const Optional& out_scale, const Optional& out_zero, int64_t out_bits,
                           const Optional& head_scale) {
  const c10::cuda::CUDAGuard guard(qkv.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const int64_t batch = qkv.size(0), image = qkv.size(1), width = qkv.size(2);
  const int64_t windows = index ? index->size(0) : 1, tokens = index ? index->size(1) : image;
  at::Tensor out = at::empty({batch, image, width / 3}, qkv.options().dtype(out_scale ? at::kByte : at::kFloat));
  if (out.numel() == 0) return out;
  const at::Tensor x = reinterpret_cast<uintptr_t>(qkv.const_data_ptr()) % 16 == 0
                           ? qkv.contiguous()
                           : qkv.clone(at::MemoryFormat::Contiguous);
  const auto contiguous = [](const Optional& t) { return t ? t->contiguous() : at::Tensor(); };
  const auto floats = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; };
  const at::Tensor biases = contiguous(bias), masks = contiguous(mask), places = contiguous(index),
                   scales = in_scale.contiguous(), zeros = in_zero.contiguous(), factors = contiguous(head_scale);
  Heads p{};
  p.qkv = x.const_data_ptr<uint8_t>();
  p.index = places.defined() ? places.const_data_ptr<int32_t>() : nullptr;
  p.bias = floats(biases);
  p.mask = floats(masks);
  p.in_scale = floats(scales);
  p.in_zero = floats(zeros);
  p.scale = static_cast<float>(scale);
  p.out_scale = out_scale ? out_scale->const_data_ptr<float>() : nullptr;
  p.out_zero = out_zero ? out_zero->const_data_ptr<float>() : nullptr;
  p.out_greatest = static_cast<float>((1 << out_bits) - 1);
  p.out = out.mutable_data_ptr();
  p.heads = static_cast<int>(heads);
  p.tokens = static_cast<int>(tokens);
  p.depth = static_cast<int>(width / 3 / heads);
  p.windows = static_cast<int>(windows);
  p.head_scale = floats(factors);
  TORCH_CHECK(image * width <= std::numeric_limits<uint32_t>::max(), "quant_attention: an image of qkv had ",
              image * width, " bytes; CUDA takes 2^32 - 1");
  const int64_t blocks = batch * windows * heads;
  TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "quant_attention: qkv had ", blocks,
              " heads of all images; CUDA takes 2^31 - 1");
  C10_CUDA_CHECK(launch_attention(p, blocks, stream));
  return out;
}

}  // namespace
}  // namespace attention
}  // namespace quant
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(DFQVIT_OPERATORS(cuda), CUDA, m) {
  m.impl("quant_attention", &dfqvit::quant::attention::quant_attention);
}
