// The stages of a ConvNeXt block on some pixels, and the division of pixels among threads: see
// dfqvit/quant_conv_block.h.
#include "dfqvit/quant_conv_block.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "dfqvit/build.h"
#include "dfqvit/parallel.h"
#include "dfqvit/results.h"
#include "dfqvit/thread_memory.h"

namespace dfqvit {
namespace quant {
namespace {

constexpr int64_t kPixelsTogether = 400;   // that a thread takes through all stages, about
constexpr int64_t kConvolvedTogether = 8;  // whose floats go from the convolution to the norm in the first cache

const ConvBlockArguments& checked(const ConvBlockArguments& a) {
  const auto two = [](const char* name, size_t count) {
    TORCH_CHECK_VALUE(count == 2, name, " had ", count, " entries; a block has 2");
  };
  two("weights", a.weights.size()), two("biases", a.biases.size()), two("weight_scales", a.weight_scales.size());
  two("w_bits", a.w_bits.size()), two("scales", a.scales.size()), two("zeros", a.zeros.size());
  two("a_bits", a.a_bits.size());
  const int64_t channels = a.norm_weight.numel(), hidden = a.weight_scales[0].numel();
  TORCH_CHECK_VALUE(a.conv_weight.dim() == 4 && a.conv_weight.size(0) == channels && a.conv_weight.size(1) == 1 &&
                        a.conv_weight.size(2) % 2 == 1 && a.conv_weight.size(3) == a.conv_weight.size(2) &&
                        a.conv_weight.scalar_type() == at::kFloat,
                    "conv_weight was ", a.conv_weight.scalar_type(), " ", a.conv_weight.sizes(),
                    "; it must be float32 [", channels, ", 1, S, S] of an odd S");
  TORCH_CHECK_VALUE(!a.conv_bias || (a.conv_bias->numel() == channels && a.conv_bias->scalar_type() == at::kFloat),
                    "conv_bias must be float32 [", channels, "]");
  for (const at::Tensor* norm : {&a.norm_weight, &a.norm_bias}) {
    TORCH_CHECK_VALUE(norm->numel() == channels && norm->scalar_type() == at::kFloat,
                      "norm_weight and norm_bias must be float32 [", channels, "]");
  }
  TORCH_CHECK_VALUE(a.weight_scales[1].numel() == channels, "weight_scales[1] had ", a.weight_scales[1].numel(),
                    " values; it must have ", channels);
  TORCH_CHECK_VALUE(!a.hidden_scale || a.hidden_scale->numel() == hidden, "hidden_scale had ",
                    a.hidden_scale ? a.hidden_scale->numel() : 0, " values; it must have ", hidden);
  return a;
}

NormLayer norm_of(const ConvBlockArguments& a) {
  return {a.norm_weight, a.norm_bias, a.eps, a.scales[0], a.zeros[0], a.a_bits[0]};
}

OptionalTensor given(const at::Tensor& bias) {
  return bias.numel() ? OptionalTensor(bias) : std::nullopt;
}

// [C, 1, S, S] to [S * S, C].
at::Tensor taps_first(const at::Tensor& weight) {
  const at::Tensor source = weight.contiguous();
  const int64_t channels = source.size(0), taps = source.size(2) * source.size(3);
  at::Tensor result = at::empty({taps, channels}, at::kFloat);
  const float* from = source.const_data_ptr<float>();
  float* to = result.mutable_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t t = 0; t < taps; ++t) to[t * channels + c] = from[c * taps + t];
  }
  return result;
}

}  // namespace

ConvBlock::ConvBlock(const ConvBlockArguments& a)
    : norm_(norm_of(checked(a))),
      fc1_(a.weights[0], given(a.biases[0]), {}, a.scales[0], a.zeros[0], a.weight_scales[0], a.norm_weight.numel(),
           a.a_bits[0], a.w_bits[0], a.activation.c_str(), a.hidden_scale ? *a.hidden_scale : a.scales[1], a.zeros[1],
           a.a_bits[1], at::kByte),
      fc2_(a.weights[1], given(a.biases[1]), {}, a.scales[1], a.zeros[1], a.weight_scales[1],
           a.weight_scales[0].numel(), a.a_bits[1], a.w_bits[1], "none", {}, {}, 8, at::kFloat),
      taps_(taps_first(a.conv_weight)),
      bias_(a.conv_bias ? a.conv_bias->contiguous().detach() : at::zeros({a.norm_weight.numel()}, at::kFloat)),
      conv_{taps_.const_data_ptr<float>(),
            bias_.const_data_ptr<float>(),
            a.norm_weight.numel(),
            a.conv_weight.size(2),
            0,
            0} {}

at::Tensor ConvBlock::run(const at::Tensor& x) const {
  const int64_t channels = conv_.channels;
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.dim() == 4 && x.size(3) == channels, "x was ", x.scalar_type(),
                    " ", x.sizes(), "; it must be float32 [B, H, W, ", channels, "]");
  const at::Tensor input = x.contiguous();
  at::Tensor result = empty_result(input.sizes(), at::kFloat);
  if (input.numel() == 0) return result;
  Depthwise conv = conv_;
  conv.height = input.size(1), conv.width = input.size(2);
  const Isa isa = norm_.ordinary && fc1_.ordinary && fc2_.ordinary ? active_isa() : Isa::portable;
  const Kernels kernels = kernels_for(isa);
  const NormKernels norms = norm_kernels_for(isa);
  const DepthwiseKernel depthwise = depthwise_kernel_for(isa);
  const float* from = input.const_data_ptr<float>();
  float* to = result.mutable_data_ptr<float>();
  const int64_t image = conv.height * conv.width, pixels = input.size(0) * image, threads = parallel_threads();
  const int64_t rounds = (pixels + threads * kPixelsTogether - 1) / (threads * kPixelsTogether);
  const int64_t most = (pixels + rounds * threads - 1) / (rounds * threads);
  const int64_t normed = aligned(most * fc1_.stride()), hidden = aligned(most * fc2_.stride());
  const int64_t floats = aligned(kConvolvedTogether * channels * sizeof(float));
  const int64_t scratch = std::max({floats + aligned(norm_.norm.line() * static_cast<int64_t>(sizeof(float))),
                                    fc1_.weight.scratch_bytes(fc1_.count()), fc2_.weight.scratch_bytes(fc2_.count())});
  parallel_pieces((pixels + most - 1) / most, [&](int64_t piece) {
    const int64_t first = piece * most, count = std::min(most, pixels - first);
    uint8_t* const bytes = thread_memory(normed + hidden + scratch);
    uint8_t *const between = bytes + normed, *const free = between + hidden;
    float *const convolved = reinterpret_cast<float*>(free), *const line = reinterpret_cast<float*>(free + floats);
    for (int64_t done = 0; done < count;) {
      const int64_t at = (first + done) % image, some = std::min({kConvolvedTogether, count - done, image - at});
      depthwise(from + (first + done - at) * channels, conv, at, at + some, convolved);
      const bool finite =
          norms.quantize(convolved, Type::f32, some, norm_.norm, bytes + done * fc1_.stride(), fc1_.stride(), line);
      TORCH_CHECK_VALUE(finite, "x held NaN or Inf; every value must be finite");
      done += some;
    }
    const auto multiply = [&](const LinearLayer& layer, const uint8_t* a, const float* residual, void* out,
                              int64_t stride) {
      Epilogue e = layer.epilogue;
      e.columns = layer.columns.data();
      e.residual = residual;
      e.out = out;
      e.out_stride = stride;
      kernels.linear(a, layer.stride(), count, layer.weight, 0, layer.count(), free, e);
    };
    multiply(fc1_, bytes, nullptr, between, fc2_.stride());
    multiply(fc2_, between, from + first * channels, to + first * channels, channels);
  });
  return result;
}

namespace {

at::Tensor quant_conv_block(const at::Tensor& x, const at::Tensor& conv_weight, const OptionalTensor& conv_bias,
                            const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps,
                            at::TensorList weights, at::TensorList biases, at::TensorList weight_scales,
                            at::IntArrayRef w_bits, at::TensorList scales, at::TensorList zeros, at::IntArrayRef a_bits,
                            const OptionalTensor& hidden_scale, c10::string_view activation) {
  calm_openmp();
  return ConvBlock({conv_weight, conv_bias, norm_weight, norm_bias, eps, weights.vec(), biases.vec(),
                    weight_scales.vec(), w_bits.vec(), scales.vec(), zeros.vec(), a_bits.vec(), hidden_scale,
                    std::string(activation)})
      .run(x);
}

}  // namespace
}  // namespace quant
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(DFQVIT_OPERATORS(cpu), CPU, m) {
  m.impl("quant_conv_block", &dfqvit::quant::quant_conv_block);
}
