// The constant arguments of the CPU operators as their kernels want them, for one call or, in a chain of operators, for
// all calls. For the bindings: the kernels know no torch.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "dfqvit/gate_quantize.h"
#include "dfqvit/layer_norm_quantize.h"
#include "dfqvit/quant_attention.h"
#include "dfqvit/quant_linear.h"

namespace dfqvit {
namespace quant {

using OptionalTensor = std::optional<at::Tensor>;

inline Type type_of(at::ScalarType type) {
  return type == at::kFloat ? Type::f32 : type == at::kBFloat16 ? Type::bf16 : type == at::kHalf ? Type::f16 : Type::u8;
}

// The one float32 value of a scale or zero point; ValueError when it is not one.
inline float scalar_of(const char* name, const at::Tensor& value) {
  TORCH_CHECK_VALUE(value.numel() == 1 && value.scalar_type() == at::kFloat, name, " had ", value.numel(),
                    " values of ", value.scalar_type(), "; it must be one float32");
  return *value.const_data_ptr<float>();
}

// The value; ValueError unless it is finite and greater than 0.
float scale_value(const char* name, float value);

// The value; ValueError unless it is a whole number from 0 to `greatest`.
float whole_value(const char* name, float value, int64_t greatest);

// ValueError where a value is NaN or Inf; nothing for a tensor that is not there.
void check_finite(const char* name, const float* values, int64_t count);
void check_finite(const char* name, const OptionalTensor& tensor);

// The activation of a name, and its slope; ValueError when there is none.
void set_activation(c10::string_view name, Activation& activation, float& slope);

// quant_linear without its input and residual; the arguments are the operator's. out_scale and out_zero may also have
// fewer values than there are outputs, which share them evenly: q, k and v.
struct LinearLayer {
  LinearLayer(const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& acm,
              const at::Tensor& x_scale, const at::Tensor& x_zero, const at::Tensor& w_scale, int64_t in_features,
              int64_t a_bits, int64_t w_bits, c10::string_view activation, const OptionalTensor& out_scale,
              const OptionalTensor& out_zero, int64_t out_bits, at::ScalarType out_dtype);

  at::Tensor blocks, corrections;  // what the pointers below point to
  std::vector<Columns> columns;
  Weight weight;
  int64_t in_features, out_features;
  Quantizer input;
  Epilogue epilogue;  // but for the residual and the result
  bool ordinary;      // whether the fast quotients are exact

  // For many calls: copies acm so that what a tile adds lies together, [blocks, tokens, 16].
  void gather_acm();

  int64_t count() const { return static_cast<int64_t>(columns.size()); }  // of blocks
  int64_t stride() const { return weight.chunks * kDepth; }               // bytes of a padded row of the input
};

// layer_norm_quantize without its input.
struct NormLayer {
  NormLayer(const at::Tensor& weight, const at::Tensor& bias, double eps, const at::Tensor& scale,
            const at::Tensor& zero_point, int64_t bits);

  at::Tensor gain, offset;
  Norm norm;
  bool ordinary;
};

// gate_quantize without its inputs.
struct GateLayer {
  GateLayer(const at::Tensor& scale, const at::Tensor& zero_point, int64_t bits, int64_t channels,
            c10::string_view activation);

  at::Tensor steps;  // what the pointers below point to
  Gate gate;
  bool ordinary;
};

// quant_attention without its input.
struct AttentionLayer {
  AttentionLayer(int64_t heads, const at::Tensor& in_scale, const at::Tensor& in_zero, double scale,
                 const OptionalTensor& bias, const OptionalTensor& mask, const OptionalTensor& index,
                 const OptionalTensor& out_scale, const OptionalTensor& out_zero, int64_t out_bits,
                 const OptionalTensor& head_scale = {});

  // What depends on the image: tokens of it, and channels of its result.
  Heads heads_of(int64_t image, int64_t channels) const;
  // ValueError unless bias, mask and index fit images of so many tokens.
  void check_tokens(int64_t image) const;
  // Attends in rows begin to end of one head of one window. `qkv`, `stride` bytes from row to row, and the result: of
  // the image, row 0; `end_of_qkv`: of the memory that may be read.
  void run(const AttentionKernels& kernels, const Heads& all, const Workspace& work, int64_t head, int64_t window,
           int64_t begin, int64_t end, const uint8_t* qkv, int64_t stride, const uint8_t* end_of_qkv,
           void* result) const;

  int64_t heads, windows;
  at::Tensor biases, masks, places;  // undefined where there are none
  at::Tensor factors;                // float [heads] of the scores, or undefined
  Heads constants;
  bool integers, ordinary;
};

}  // namespace quant
}  // namespace dfqvit
