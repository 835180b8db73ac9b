// The stages of a ConvNeXt block on some pixels, and the division of pixels among threads: see
// dfqvit/quant_conv_block.h.
#include "dfqvit/quant_conv_block.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "dfqvit/build.h"
#include "dfqvit/parallel.h"
#include "dfqvit/results.h"
#include "dfqvit/thread_memory.h"

namespace dfqvit {
namespace quant {
namespace {

constexpr int64_t kPixelsTogether = 400;   // that a thread takes through all stages, about
constexpr int64_t kConvolvedTogether = 8;  // whose floats go from the convolution to the norm in the first cache
constexpr int64_t kSummedTogether = 16;    // of an image, whose squares are one sum

// Of so many pixels, those of a piece: about kPixelsTogether, and the same number of pieces for each thread.
int64_t pixels_of_piece(int64_t pixels) {
  const int64_t threads = parallel_threads();
  const int64_t rounds = (pixels + threads * kPixelsTogether - 1) / (threads * kPixelsTogether);
  return (pixels + rounds * threads - 1) / (rounds * threads);
}

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
  TORCH_CHECK_VALUE(a.grn_weight.has_value() == a.grn_bias.has_value(), "grn_bias must be given if grn_weight is");
  for (const OptionalTensor* grn : {&a.grn_weight, &a.grn_bias}) {
    TORCH_CHECK_VALUE(!*grn || ((*grn)->numel() == hidden && (*grn)->scalar_type() == at::kFloat),
                      "grn_weight and grn_bias must be float32 [", hidden, "]");
    check_finite("grn_weight or grn_bias", *grn);
  }
  return a;
}

NormLayer norm_of(const ConvBlockArguments& a) {
  return {a.norm_weight, a.norm_bias, a.eps, a.scales[0], a.zeros[0], a.a_bits[0]};
}

OptionalTensor given(const at::Tensor& bias) {
  return bias.numel() ? OptionalTensor(bias) : std::nullopt;
}

const at::Tensor& hidden_scales(const ConvBlockArguments& a) {
  return a.hidden_scale ? *a.hidden_scale : a.scales[1];
}

// fc1, whose result is rounded at once but where a response norm must see all of an image first.
LinearLayer first_layer(const ConvBlockArguments& a) {
  const bool whole = a.grn_weight.has_value();
  return {a.weights[0],
          given(a.biases[0]),
          {},
          a.scales[0],
          a.zeros[0],
          a.weight_scales[0],
          a.norm_weight.numel(),
          a.a_bits[0],
          a.w_bits[0],
          a.activation,
          whole ? OptionalTensor() : hidden_scales(a),
          whole ? OptionalTensor() : a.zeros[1],
          a.a_bits[1],
          whole ? at::kFloat : at::kByte};
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
      fc1_(first_layer(a)),
      fc2_(a.weights[1], given(a.biases[1]), {}, a.scales[1], a.zeros[1], a.weight_scales[1],
           a.weight_scales[0].numel(), a.a_bits[1], a.w_bits[1], "none", {}, {}, 8, at::kFloat),
      taps_(taps_first(a.conv_weight)),
      bias_(a.conv_bias ? a.conv_bias->contiguous().detach() : at::zeros({a.norm_weight.numel()}, at::kFloat)),
      conv_{taps_.const_data_ptr<float>(),
            bias_.const_data_ptr<float>(),
            a.norm_weight.numel(),
            a.conv_weight.size(2),
            0,
            0} {
  if (!a.grn_weight) return;
  const int64_t channels = fc1_.out_features;
  response_.emplace(hidden_scales(a), a.zeros[1], a.a_bits[1], channels, "none");
  grn_weight_ = a.grn_weight->contiguous().detach();
  grn_bias_ = at::zeros({response_->steps.size(1)}, at::kFloat);
  std::copy_n(a.grn_bias->contiguous().const_data_ptr<float>(), channels, grn_bias_.mutable_data_ptr<float>());
  grn_eps_ = a.grn_eps;
}

// What a call of ConvBlock::run knows.
struct ConvBlock::Call {
  Call(const ConvBlock& block, const at::Tensor& x, at::Tensor& result)
      : b(block),
        conv(block.conv_),
        from(x.const_data_ptr<float>()),
        to(result.mutable_data_ptr<float>()),
        pixels(x.size(0) * x.size(1) * x.size(2)) {
    conv.height = x.size(1), conv.width = x.size(2);
    const Isa isa = b.norm_.ordinary && b.fc1_.ordinary && b.fc2_.ordinary && (!b.response_ || b.response_->ordinary)
                        ? active_isa()
                        : Isa::portable;
    kernels = kernels_for(isa), norms = norm_kernels_for(isa), convs = conv_kernels_for(isa);
    gates = gate_kernel_for(isa);
    floats = aligned(kConvolvedTogether * conv.channels * sizeof(float));
    scratch = std::max({floats + aligned(b.norm_.norm.scratch() * static_cast<int64_t>(sizeof(float))),
                        b.fc1_.weight.scratch_bytes(b.fc1_.count()), b.fc2_.weight.scratch_bytes(b.fc2_.count())});
  }

  int64_t image() const { return conv.height * conv.width; }  // pixels of it

  // Convolution and norm of `count` pixels to rows of fc1's input.
  void norm(int64_t first, int64_t count, uint8_t* bytes, uint8_t* free) const {
    float *const convolved = reinterpret_cast<float*>(free), *const lines = reinterpret_cast<float*>(free + floats);
    for (int64_t done = 0; done < count;) {
      const int64_t at = (first + done) % image(), some = std::min({kConvolvedTogether, count - done, image() - at});
      convs.depthwise(from + (first + done - at) * conv.channels, conv, at, at + some, convolved);
      const bool finite = norms.quantize(convolved, Type::f32, some, b.norm_.norm, bytes + done * b.fc1_.stride(),
                                         b.fc1_.stride(), lines);
      TORCH_CHECK_VALUE(finite, "x held NaN or Inf; every value must be finite");
      done += some;
    }
  }

  void multiply(const LinearLayer& layer, const uint8_t* a, int64_t count, const float* residual, void* out,
                int64_t stride, uint8_t* free) const {
    Epilogue e = layer.epilogue;
    e.columns = layer.columns.data();
    e.residual = residual;
    e.out = out;
    e.out_stride = stride;
    kernels.linear(a, layer.stride(), count, layer.weight, 0, layer.count(), free, e);
  }

  // fc2 of rows of its input, and x.
  void close(int64_t first, int64_t count, const uint8_t* bytes, uint8_t* free) const {
    const int64_t channels = conv.channels;
    multiply(b.fc2_, bytes, count, from + first * channels, to + first * channels, channels, free);
  }

  // Pixels go through all stages together.
  void straight() const {
    const int64_t most = pixels_of_piece(pixels);
    const int64_t normed = aligned(most * b.fc1_.stride()), hidden = aligned(most * b.fc2_.stride());
    parallel_pieces((pixels + most - 1) / most, [&](int64_t piece) {
      const int64_t first = piece * most, count = std::min(most, pixels - first);
      uint8_t* const bytes = thread_memory(normed + hidden + scratch);
      uint8_t *const between = bytes + normed, *const free = between + hidden;
      norm(first, count, bytes, free);
      multiply(b.fc1_, bytes, count, nullptr, between, b.fc2_.stride(), free);
      close(first, count, between, free);
    });
  }

  // A response norm needs all of an image, so its hidden values wait as floats: of as many images at a time as keep the
  // threads busy, in whose memory they lie in the last cache. An image's squares are summed by kSummedTogether pixels,
  // and these sums in their order, whoever does which.
  void by_images() const {
    const int64_t images = pixels / image(), channels = b.fc1_.out_features, threads = parallel_threads();
    const int64_t together = std::min(images, (threads * kPixelsTogether + image() - 1) / image());
    const int64_t chunks = (image() + kSummedTogether - 1) / kSummedTogether;
    at::Tensor memory = empty_result({together * (image() + chunks + 1), channels}, at::kFloat);
    float* const values = memory.mutable_data_ptr<float>();
    float *const sums = values + together * image() * channels, *const factors = sums + together * chunks * channels;
    for (int64_t image_of = 0; image_of < images; image_of += together) {
      const int64_t some = std::min(together, images - image_of), start = image_of * image();
      hidden_values(start, some, chunks, values, sums);
      parallel_pieces(some,
                      [&](int64_t i) { factors_of(sums + i * chunks * channels, chunks, factors + i * channels); });
      results(start, some, values, factors);
    }
  }

  // fc1 of some images whose first pixel is `start`, and the sums of its squares.
  void hidden_values(int64_t start, int64_t images, int64_t chunks, float* values, float* sums) const {
    const int64_t channels = b.fc1_.out_features, all = images * chunks;
    const int64_t most = (pixels_of_piece(images * image()) + kSummedTogether - 1) / kSummedTogether;
    const int64_t normed = aligned(std::min(most * kSummedTogether, images * image()) * b.fc1_.stride());
    // The pixel that a chunk begins with, of those of `images`.
    const auto begin = [&](int64_t chunk) { return chunk / chunks * image() + chunk % chunks * kSummedTogether; };
    parallel_pieces((all + most - 1) / most, [&](int64_t piece) {
      const int64_t first = piece * most, end = std::min(first + most, all), pixel = begin(first);
      const int64_t count = begin(end) - pixel;
      uint8_t *const bytes = thread_memory(normed + scratch), *const free = bytes + normed;
      norm(start + pixel, count, bytes, free);
      multiply(b.fc1_, bytes, count, nullptr, values + pixel * channels, channels, free);
      for (int64_t chunk = first; chunk < end; ++chunk) {
        const int64_t at = begin(chunk);
        convs.sum_squares(values + at * channels, begin(chunk + 1) - at, channels, sums + chunk * channels);
      }
    });
  }

  // 1 + weight * |h| / (mean of |h| + eps), of an image whose hidden values have these sums of squares; in `sums` too.
  void factors_of(const float* sums, int64_t chunks, float* factors) const {
    const int64_t channels = b.fc1_.out_features;
    const float* const weight = b.grn_weight_.const_data_ptr<float>();
    double mean = 0;
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk * channels + c];
      factors[c] = static_cast<float>(std::sqrt(sum));
      mean += factors[c];
    }
    const float rest = static_cast<float>(mean / static_cast<double>(channels) + b.grn_eps_);
    for (int64_t c = 0; c < channels; ++c) factors[c] = 1.0f + weight[c] * (factors[c] / rest);
  }

  // The norm, rounding and fc2 of the hidden values of some images.
  void results(int64_t start, int64_t images, const float* values, const float* factors) const {
    const int64_t channels = b.fc1_.out_features, all = images * image();
    const int64_t most = pixels_of_piece(all);
    const int64_t hidden = aligned(most * b.fc2_.stride());
    Gate gate = b.response_->gate;
    gate.offset = b.grn_bias_.const_data_ptr<float>();
    parallel_pieces((all + most - 1) / most, [&](int64_t piece) {
      const int64_t first = piece * most, end = std::min(first + most, all);
      uint8_t *const bytes = thread_memory(hidden + scratch), *const free = bytes + hidden;
      for (int64_t pixel = first; pixel < end;) {
        const int64_t of = pixel / image(), some = std::min((of + 1) * image(), end) - pixel;
        const bool finite = gates(factors + of * channels, 0, values + pixel * channels, channels, some, gate,
                                  bytes + (pixel - first) * b.fc2_.stride(), b.fc2_.stride());
        TORCH_CHECK_VALUE(finite, "a response norm of x gave NaN or Inf; every value must be finite");
        pixel += some;
      }
      close(start + first, end - first, bytes, free);
    });
  }

  const ConvBlock& b;
  Depthwise conv;
  const float* from;
  float* to;
  int64_t pixels;  // of all images
  Kernels kernels;
  NormKernels norms;
  ConvKernels convs;
  GateKernel gates;
  int64_t floats, scratch;  // bytes
};

at::Tensor ConvBlock::run(const at::Tensor& x) const {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.dim() == 4 && x.size(3) == conv_.channels, "x was ",
                    x.scalar_type(), " ", x.sizes(), "; it must be float32 [B, H, W, ", conv_.channels, "]");
  const at::Tensor input = x.contiguous();
  at::Tensor result = empty_result(input.sizes(), at::kFloat);
  if (input.numel() == 0) return result;
  const Call call(*this, input, result);
  response_ ? call.by_images() : call.straight();
  return result;
}

namespace {

at::Tensor quant_conv_block(const at::Tensor& x, const at::Tensor& conv_weight, const OptionalTensor& conv_bias,
                            const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps,
                            at::TensorList weights, at::TensorList biases, at::TensorList weight_scales,
                            at::IntArrayRef w_bits, at::TensorList scales, at::TensorList zeros, at::IntArrayRef a_bits,
                            const OptionalTensor& hidden_scale, c10::string_view activation,
                            const OptionalTensor& grn_weight, const OptionalTensor& grn_bias, double grn_eps) {
  calm_openmp();
  return ConvBlock({conv_weight, conv_bias, norm_weight, norm_bias, eps, weights.vec(), biases.vec(),
                    weight_scales.vec(), w_bits.vec(), scales.vec(), zeros.vec(), a_bits.vec(), hidden_scale,
                    std::string(activation), grn_weight, grn_bias, grn_eps})
      .run(x);
}

}  // namespace
}  // namespace quant
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(DFQVIT_OPERATORS(cpu), CPU, m) {
  m.impl("quant_conv_block", &dfqvit::quant::quant_conv_block);
}
