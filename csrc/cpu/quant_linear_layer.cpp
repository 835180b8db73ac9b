// LinearLayer: the weight in blocks, and the constants of the epilogue, checked.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "dfqvit/layers.h"

namespace dfqvit {
namespace quant {
namespace {

float finite_value(const char* name, float value) {
  TORCH_CHECK_VALUE(std::isfinite(value), name, " held NaN or Inf; every value must be finite");
  return value;
}

float scale_value(const char* name, float value) {
  finite_value(name, value);
  TORCH_CHECK_VALUE(value > 0, name, " held ", value, "; every scale must be greater than 0");
  return value;
}

float whole_value(const char* name, float value, int64_t greatest) {
  TORCH_CHECK_VALUE(value >= 0 && value <= greatest && value == std::nearbyint(value), name, " held ", value,
                    "; it must be a whole number from 0 to ", greatest);
  return value;
}

// One row of a canonical packed weight (kernels/pack_weight), as bytes.
void unpack_row(const uint8_t* packed, int64_t columns, int64_t bits, int8_t* out) {
  const int sign = 1 << (bits - 1), mask = (1 << bits) - 1;
  for (int64_t k = 0; k < columns; ++k) {
    const int64_t bit = k % 8 * bits;
    const uint8_t* group = packed + k / 8 * bits + bit / 8;
    const int pair = group[0] | (bit % 8 + bits > 8 ? group[1] << 8 : 0);
    out[k] = static_cast<int8_t>((((pair >> bit % 8) & mask) ^ sign) - sign);
  }
}

void quantize_weight_row(const float* w, int64_t columns, float scale, int64_t bits, int8_t* out) {
  const float half = static_cast<float>(1 << (bits - 1));
  bool finite = true;
  for (int64_t k = 0; k < columns; ++k) {
    const float q = std::nearbyint(w[k] / scale);
    finite &= std::isfinite(w[k]);
    out[k] = static_cast<int8_t>(q < -half ? -half : q > half - 1 ? half - 1 : q);
  }
  TORCH_CHECK_VALUE(finite, "weight held NaN or Inf; every value must be finite");
}

// A float or packed weight in 8-bit blocks: for calls without block_weight.
at::Tensor blocked(const at::Tensor& weight, const float* scales, int64_t columns, int64_t bits) {
  const bool is_float = weight.scalar_type() != at::kByte;
  const at::Tensor source = is_float ? weight.to(at::kFloat).contiguous() : weight.contiguous();
  const int64_t outputs = weight.size(0), chunks = (columns + kDepth - 1) / kDepth;
  const int64_t row = kOutputs + chunks * kChunk / 4, blocks = (outputs + kOutputs - 1) / kOutputs;
  at::Tensor result = at::empty({blocks, row}, weight.options().dtype(at::kInt));
  int32_t* data = result.mutable_data_ptr<int32_t>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<int8_t> integers(columns);
    for (int64_t block = begin; block < end; ++block) {
      int32_t* sums = data + block * row;
      std::memset(sums, 0, row * sizeof(int32_t));
      int8_t* values = reinterpret_cast<int8_t*>(sums + kOutputs);
      for (int64_t n = 0; n < std::min<int64_t>(kOutputs, outputs - block * kOutputs); ++n) {
        const int64_t output = block * kOutputs + n;
        if (is_float) {
          quantize_weight_row(source.const_data_ptr<float>() + output * columns, columns, scales[output], bits,
                              integers.data());
        } else {
          unpack_row(source.const_data_ptr<uint8_t>() + output * source.size(1), columns, bits, integers.data());
        }
        for (int64_t k = 0; k < columns; ++k) {
          sums[n] += integers[k];
          values[k / 4 * 64 + n * 4 + k % 4] = integers[k];
        }
      }
    }
  });
  return result;
}

at::Tensor floats(const OptionalTensor& tensor) {
  return tensor ? tensor->to(at::kFloat).contiguous() : at::Tensor();
}

}  // namespace

LinearLayer::LinearLayer(const at::Tensor& weight_in, const OptionalTensor& bias, const OptionalTensor& acm,
                         const at::Tensor& x_scale, const at::Tensor& x_zero, const at::Tensor& w_scale,
                         int64_t in_features, int64_t a_bits, int64_t w_bits, c10::string_view activation,
                         const OptionalTensor& out_scale, const OptionalTensor& out_zero, int64_t out_bits,
                         at::ScalarType out_dtype)
    : in_features(in_features), out_features(w_scale.numel()) {
  const at::Tensor w_scales = w_scale.contiguous();
  const float* scales = w_scales.const_data_ptr<float>();
  const int64_t greatest = (1 << a_bits) - 1;
  const float step = scale_value("x_scale", *x_scale.const_data_ptr<float>());
  const float zero = whole_value("x_zero", *x_zero.const_data_ptr<float>(), greatest);
  for (int64_t n = 0; n < out_features; ++n) {
    TORCH_CHECK_VALUE(finite_value("w_scale", scales[n]) != 0, "w_scale held 0; no scale of a weight may be 0");
  }
  input = {step, 1.0f / step, zero, static_cast<float>(greatest)};
  ordinary = ordinary_divisor(step);

  const bool given = weight_in.scalar_type() == at::kInt;
  blocks = given ? weight_in.contiguous() : blocked(weight_in, scales, in_features, w_bits);
  weight = {blocks.const_data_ptr<int32_t>(), blocks.size(1), chunks_of(in_features),
            !given || w_bits > 4 ? 8
            : w_bits == 4        ? 4
                                 : 3};

  const at::Tensor biases = floats(bias), out_scales = floats(out_scale), out_zeros = floats(out_zero);
  columns.resize(blocks.size(0));
  for (int64_t n = 0; n < blocks.size(0) * kOutputs; ++n) {
    Columns& c = columns[n / kOutputs];
    const int64_t i = n % kOutputs;
    const bool real = n < out_features;
    c.scale[i] = real ? step * scales[n] : 0.0f;
    c.start[i] = -static_cast<int32_t>(zero) * weight.sums(n / kOutputs)[i];
    c.bias[i] = real && bias ? biases.const_data_ptr<float>()[n] : 0.0f;
    c.out_scale[i] = real && out_scale ? scale_value("out_scale", out_scales.const_data_ptr<float>()[n]) : 1.0f;
    c.out_zero[i] =
        real && out_zero ? whole_value("out_zero", out_zeros.const_data_ptr<float>()[n], (1 << out_bits) - 1) : 0.0f;
    c.out_reciprocal[i] = 1.0f / c.out_scale[i];
    ordinary = ordinary && ordinary_divisor(c.out_scale[i]);
  }

  epilogue = Epilogue{};
  epilogue.columns = columns.data();
  epilogue.out_features = epilogue.out_stride = out_features;
  epilogue.activation = activation == "gelu"        ? Activation::gelu
                        : activation == "gelu_tanh" ? Activation::gelu_tanh
                                                    : Activation::none;
  if (acm) corrections = (acm->scalar_type() == at::kDouble ? acm->to(at::kFloat) : *acm).contiguous();
  epilogue.acm = acm ? corrections.const_data_ptr() : nullptr;
  epilogue.acm_row = out_features;
  epilogue.acm_block = kOutputs;
  epilogue.acm_type = acm ? type_of(corrections.scalar_type()) : Type::f32;
  epilogue.tokens = acm ? acm->size(0) : 1;
  epilogue.type = type_of(out_dtype);
  epilogue.out_greatest = static_cast<float>((1 << out_bits) - 1);
}

void LinearLayer::gather_acm() {
  if (!corrections.defined()) return;
  const at::Tensor gathered = at::zeros({count(), epilogue.tokens, kOutputs}, corrections.options());
  const int64_t width = corrections.element_size();
  const char* from = static_cast<const char*>(corrections.const_data_ptr());
  char* to = static_cast<char*>(gathered.mutable_data_ptr());
  for (int64_t block = 0; block < count(); ++block) {
    const int64_t column = block * kOutputs, valid = std::min<int64_t>(kOutputs, out_features - column);
    for (int64_t t = 0; t < epilogue.tokens; ++t, to += kOutputs * width) {
      std::memcpy(to, from + (t * out_features + column) * width, valid * width);
    }
  }
  corrections = gathered;
  epilogue.acm = corrections.const_data_ptr();
  epilogue.acm_row = kOutputs;
  epilogue.acm_block = epilogue.tokens * kOutputs;
}

}  // namespace quant
}  // namespace dfqvit
