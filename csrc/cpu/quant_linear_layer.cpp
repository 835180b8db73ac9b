// LinearLayer: the weight in blocks, and the constants of the epilogue, checked.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <limits>
#include <string>

#include "dfqvit/layers.h"
#include "dfqvit/parallel.h"

namespace dfqvit {
namespace quant {
namespace {

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
  parallel_ranges(blocks, 1, [&](int64_t begin, int64_t end) {
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

// Float32 values, `count` of them, each for as many neighbours: a pointer, and the tensor or vector that owns them.
class Values {
 public:
  Values(const char* name, const OptionalTensor& tensor, int64_t count) {
    if (!tensor) return;
    owner_ = tensor->to(at::kFloat).contiguous();
    data = owner_.const_data_ptr<float>();
    const int64_t given = owner_.numel();
    TORCH_CHECK_VALUE(given > 0 && count % given == 0, name, " had ", given, " values for ", count, " outputs");
    if (given == count) return;
    spread_.resize(count);
    for (int64_t i = 0; i < given; ++i) std::fill_n(spread_.data() + i * (count / given), count / given, data[i]);
    data = spread_.data();
  }
  const float* data = nullptr;

 private:
  at::Tensor owner_;
  std::vector<float> spread_;
};

bool all_nonzero(const float* values, int64_t count) {
  int wrong = 0;
  for (int64_t i = 0; i < count; ++i) wrong |= values[i] == 0.0f;
  return !wrong;
}

void check_weight(const at::Tensor& weight, int64_t outputs, int64_t columns, int64_t bits) {
  const int64_t blocks = blocks_of(outputs), stored = bits <= 3 ? 3 : bits == 4 ? 4 : 8;
  const bool given = weight.scalar_type() == at::kInt, packed = weight.scalar_type() == at::kByte;
  const int64_t rows = given ? blocks : outputs;
  const int64_t row = given    ? kOutputs + chunks_of(columns) * kChunk * stored / 32
                      : packed ? (columns + 7) / 8 * bits
                               : columns;
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == row, "weight had shape ",
                    weight.sizes(), "; for ", outputs, " outputs of ", columns, " values it must be [", rows, ", ", row,
                    "]");
}

}  // namespace

float scale_value(const char* name, float value) {
  TORCH_CHECK_VALUE(std::isfinite(value), name, " held NaN or Inf; every value must be finite");
  TORCH_CHECK_VALUE(value > 0, name, " held ", value, "; every scale must be greater than 0");
  return value;
}

float whole_value(const char* name, float value, int64_t greatest) {
  TORCH_CHECK_VALUE(value >= 0 && value <= greatest && value == std::nearbyint(value), name, " held ",
                    std::setprecision(17), static_cast<double>(value), "; it must be a whole number from 0 to ",
                    greatest);
  return value;
}

// A plain loop: the compiler makes vectors of it.
void check_finite(const char* name, const float* values, int64_t count) {
  int wrong = 0;
  for (int64_t i = 0; i < count; ++i) wrong |= !(std::fabs(values[i]) <= std::numeric_limits<float>::max());
  TORCH_CHECK_VALUE(!wrong, name, " held NaN or Inf; every value must be finite");
}

void check_finite(const char* name, const OptionalTensor& tensor) {
  if (!tensor) return;
  const at::Tensor values = tensor->to(at::kFloat).contiguous();
  check_finite(name, values.const_data_ptr<float>(), values.numel());
}

void set_activation(c10::string_view name, Activation& activation, float& slope) {
  struct Named {
    const char* name;
    Activation activation;
    float slope;
  };
  constexpr Named all[] = {{"none", Activation::none, 0.0f},
                           {"gelu", Activation::gelu, 0.0f},
                           {"gelu_tanh", Activation::gelu_tanh, 0.0f},
                           {"quick_gelu", Activation::swish, 1.702f},
                           {"silu", Activation::swish, 1.0f}};
  for (const Named& each : all) {
    if (name != each.name) continue;
    activation = each.activation;
    slope = each.slope;
    return;
  }
  TORCH_CHECK_VALUE(false, "activation was '", std::string(name),
                    "'; it may be 'none', 'gelu', 'gelu_tanh', 'quick_gelu' or 'silu'");
}

LinearLayer::LinearLayer(const at::Tensor& weight_in, const OptionalTensor& bias, const OptionalTensor& acm,
                         const at::Tensor& x_scale, const at::Tensor& x_zero, const at::Tensor& w_scale,
                         int64_t in_features, int64_t a_bits, int64_t w_bits, c10::string_view activation,
                         const OptionalTensor& out_scale, const OptionalTensor& out_zero, int64_t out_bits,
                         at::ScalarType out_dtype)
    : in_features(in_features), out_features(w_scale.numel()) {
  TORCH_CHECK_VALUE(2 <= a_bits && a_bits <= 8 && 2 <= w_bits && w_bits <= 8 && 2 <= out_bits && out_bits <= 8,
                    "bits were ", a_bits, ", ", w_bits, " and ", out_bits, "; they may be 2 to 8");
  check_weight(weight_in, out_features, in_features, w_bits);
  const Values scales("w_scale", w_scale, out_features);
  const int64_t greatest = (1 << a_bits) - 1;
  const float step = scale_value("x_scale", scalar_of("x_scale", x_scale));
  const float zero = whole_value("x_zero", scalar_of("x_zero", x_zero), greatest);
  check_finite("w_scale", scales.data, out_features);
  TORCH_CHECK_VALUE(all_nonzero(scales.data, out_features), "w_scale held 0; no scale of a weight may be 0");
  input = {step, 1.0f / step, zero, static_cast<float>(greatest)};
  ordinary = ordinary_divisor(step);

  const bool given = weight_in.scalar_type() == at::kInt;
  blocks = given ? weight_in.contiguous().detach() : blocked(weight_in, scales.data, in_features, w_bits);
  weight = {blocks.const_data_ptr<int32_t>(),
            blocks.size(1),
            in_features,
            chunks_of(in_features),
            !given || w_bits > 4 ? 8
            : w_bits == 4        ? 4
                                 : 3,
            static_cast<int>(w_bits)};

  TORCH_CHECK_VALUE(!bias || bias->numel() == out_features, "bias had ", bias ? bias->numel() : 0,
                    " values; it must have ", out_features);
  const Values biases("bias", bias, out_features), out_scales("out_scale", out_scale, out_features),
      out_zeros("out_zero", out_zero, out_features);
  if (bias) check_finite("bias", biases.data, out_features);
  TORCH_CHECK_VALUE(out_scale.has_value() == out_zero.has_value(), "out_zero must be given if out_scale is");
  if (out_scale) {
    check_finite("acm", acm);  // of integers NaN makes some that look right; in a float result it shows
    for (int64_t n = 0; n < out_features; ++n) {
      ordinary = ordinary && ordinary_divisor(out_scales.data[n]);
      if (out_scales.data[n] > 0 && out_scales.data[n] <= std::numeric_limits<float>::max()) continue;
      scale_value("out_scale", out_scales.data[n]);
    }
    for (int64_t n = 0; n < out_features; ++n) whole_value("out_zero", out_zeros.data[n], (1 << out_bits) - 1);
  }
  columns.resize(blocks.size(0));
  for (int64_t block = 0; block < count(); ++block) {
    Columns& c = columns[block];
    const int64_t first = block * kOutputs, real = std::min<int64_t>(kOutputs, out_features - first);
    const int32_t* sums = weight.sums(block);
    const auto place = [&](float* to, const float* from, float rest) {
      for (int64_t i = 0; i < kOutputs; ++i) to[i] = from && i < real ? from[first + i] : rest;
    };
    for (int64_t i = 0; i < kOutputs; ++i) c.scale[i] = i < real ? step * scales.data[first + i] : 0.0f;
    for (int64_t i = 0; i < kOutputs; ++i) c.start[i] = -static_cast<int32_t>(zero) * sums[i];
    place(c.bias, biases.data, 0.0f);
    place(c.out_scale, out_scales.data, 1.0f);
    place(c.out_zero, out_zeros.data, 0.0f);
    for (int64_t i = 0; i < kOutputs; ++i) c.out_reciprocal[i] = 1.0f / c.out_scale[i];
  }

  epilogue = Epilogue{};
  epilogue.columns = columns.data();
  epilogue.out_features = epilogue.out_stride = out_features;
  set_activation(activation, epilogue.activation, epilogue.slope);
  if (acm) {
    TORCH_CHECK_VALUE(acm->dim() == 2 && acm->size(1) == out_features && acm->size(0) > 0, "acm had shape ",
                      acm->sizes(), "; it must be [tokens, ", out_features, "]");
    corrections = (acm->scalar_type() == at::kDouble ? acm->to(at::kFloat) : *acm).contiguous().detach();
  }
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
