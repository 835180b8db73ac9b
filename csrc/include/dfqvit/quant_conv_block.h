// A ConvNeXt block of the integer runtime in one call, dfqvit::quant_conv_block:
//
//     x -> depthwise convolution -> LayerNorm + quantize -> fc1 -> fc2 + x
//
// The convolution is in float32 and reads x alone, so pieces of the pixels go through all stages without a wait. Only
// ConvNeXt V2's global response norm, which comes between fc1 and fc2, waits for all pixels of an image.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "dfqvit/layers.h"
#include "dfqvit/quant_conv_block_kernels.h"

namespace dfqvit {
namespace quant {

// The operator's arguments but x, as kernels/quant_conv_block/op.py describes them.
struct ConvBlockArguments {
  at::Tensor conv_weight;
  OptionalTensor conv_bias;
  at::Tensor norm_weight, norm_bias;
  double eps;
  std::vector<at::Tensor> weights;  // of fc1 and fc2; the same order below
  std::vector<at::Tensor> biases;   // with no values for none
  std::vector<at::Tensor> weight_scales;
  std::vector<int64_t> w_bits;
  std::vector<at::Tensor> scales, zeros;  // of what fc1 and fc2 take
  std::vector<int64_t> a_bits;
  OptionalTensor hidden_scale;  // of each channel of what fc2 takes, as fc1 rounds it; scales[1] for all without it
  std::string activation;
  OptionalTensor grn_weight, grn_bias;  // of a global response norm before fc2, or none
  double grn_eps;
};

class ConvBlock {
 public:
  // ValueError when lengths or shapes do not fit. What the block holds of the arguments stays alive with it.
  explicit ConvBlock(const ConvBlockArguments& arguments);

  // float32 [B, H, W, C] to the same, contiguous.
  at::Tensor run(const at::Tensor& x) const;

 private:
  struct Call;

  NormLayer norm_;
  LinearLayer fc1_, fc2_;
  at::Tensor taps_, bias_;             // what conv_ points to
  Depthwise conv_;                     // but for the image's size
  std::optional<GateLayer> response_;  // how a response norm's result is rounded, where there is one
  at::Tensor grn_weight_, grn_bias_;   // of it; the bias with zeros up to a multiple of kGateStep
  double grn_eps_ = 0;
};

}  // namespace quant
}  // namespace dfqvit
