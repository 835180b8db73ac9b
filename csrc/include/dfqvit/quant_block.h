// A transformer block of the integer runtime in one call, dfqvit::quant_block: seven operators, with the same kernels.
//
//     x -> LayerNorm + quantize -> qkv -> attention -> proj + x -> LayerNorm + quantize -> fc1 -> fc2 + residual
//
// With post_norm (Swin V2) a LayerNorm follows proj and fc2 within the residual sum, and qkv and fc1 take what they
// read quantized as it is. With head_scale, queries and keys have length 1 when they are quantized, and the scores of a
// head its scale. With a rope (DINOv3) queries and keys are turned first. With a gate (SwiGLU) half of fc1's result
// goes through the activation and multiplies the other half.
//
// What lies between the operators stays in the caches of the thread that computes it, and few threads wait for others.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dfqvit/layers.h"

namespace dfqvit {
namespace quant {

// The operator's arguments but x, as kernels/quant_block/op.py describes them.
struct BlockArguments {
  std::vector<at::Tensor> norms;  // weight and bias of the first LayerNorm, then of the second
  std::vector<double> eps;
  std::vector<at::Tensor> weights;  // of qkv, proj, fc1, fc2; the same order below
  std::vector<at::Tensor> biases;   // with no values for none
  std::vector<at::Tensor> weight_scales;
  std::vector<int64_t> w_bits;
  std::vector<at::Tensor> scales, zeros;  // of what qkv takes, of q, k, v, of what proj, fc1, fc2 take
  std::vector<int64_t> a_bits;
  int64_t heads;
  double attention_scale;
  OptionalTensor position_bias, mask, index, acm;
  OptionalTensor hidden_scale;  // of each channel of what fc2 takes, as it is rounded; scales[6] for all without it
  std::string activation;
  OptionalTensor head_scale;  // of each head: attention by cosines
  bool post_norm = false;
  bool half = false;            // whether the partners that a rope turns lie half a head apart, else side by side
  std::string gate = "none";    // or "first" or "last": the half of fc1's result that goes through the activation
  bool rotated = false;         // whether calls come with a rope
  OptionalTensor hidden_table;  // uint8 [256]: what each byte that fc2 takes becomes, where it may be few of them
};

class Block {
 public:
  // ValueError when lengths or shapes do not fit. `gather`: for many calls, see LinearLayer::gather_acm. What the block
  // holds of the arguments stays alive with it; where it is float32 and contiguous it is not copied.
  Block(const BlockArguments& arguments, bool gather);

  // float32 [B, T, C] to the same, contiguous. `rope`, where calls come with one: [R, 2 * D] or [heads, R, 2 * D],
  // sines and then cosines for the last R tokens of each image.
  at::Tensor run(const at::Tensor& x, const OptionalTensor& rope = {}) const { return run(x, rope, own_weights()); }
  bool rotated() const { return rotated_; }
  // With other weights of the same form, sums and scales, in the order of BlockArguments::weights.
  using Weights = std::array<Weight, 4>;
  at::Tensor run(const at::Tensor& x, const OptionalTensor& rope, const Weights& weights) const;
  Weights own_weights() const { return {qkv_.weight, proj_.weight, fc1_.weight, fc2_.weight}; }
  // Lets go of the weights: from now on it runs with those that it is given.
  void drop_weights();

 private:
  struct Stages;
  bool ordinary_heads() const;
  // Whether q, k and v are floats before they are rounded.
  bool wide() const { return cosine_ || rotated_; }
  // Floats of a row that lie between a layer and what rounds or adds them.
  int64_t float_width() const;

  bool post_norm_, cosine_, half_, rotated_, gate_last_;
  NormLayer norm1_, norm2_;
  LinearLayer qkv_, proj_, fc1_, fc2_;
  AttentionLayer attention_;
  std::array<Quantizer, 3> heads_;  // of q, k and v
  std::optional<GateLayer> gate_;
  std::optional<std::array<uint8_t, 256>> table_;  // of what fc2 takes
};

// A block whose constants were made for an earlier call of the operator. It serves again where every argument has the
// same values, compared bit by bit with copies: neither an address nor a version counter is believed. Weights are not
// held, and of them only form and sums are compared, for nothing else of them is in the constants.
class RememberedBlock {
 public:
  // One for these arguments, remembered or made; null where the constants are made from whole weights (not blocked, or
  // not contiguous), or anything is not on a CPU.
  static std::shared_ptr<const RememberedBlock> find(const BlockArguments& arguments);

  at::Tensor run(const at::Tensor& x, const OptionalTensor& rope, const std::vector<at::Tensor>& weights) const;

 private:
  explicit RememberedBlock(const BlockArguments& copies);
  bool fits(const BlockArguments& arguments) const;

  BlockArguments constants_;                // without weights
  std::vector<std::vector<int32_t>> sums_;  // of the weights
  Block block_;
};

}  // namespace quant
}  // namespace dfqvit
