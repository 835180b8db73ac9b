// dfqvit_cpu::quant_linear. Here: the arguments as the kernels want them, and the division of work among threads; the
// kernels are in dfqvit/quant_linear_body.h. With many rows a thread takes row blocks: it quantizes one into its own
// buffer, small enough for the second cache, and multiplies it with all outputs. With few rows the threads share the
// quantized rows and take outputs.
#include "dfqvit/quant_linear.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <atomic>
#include <cmath>
#include <optional>
#include <vector>

#include "dfqvit/thread_memory.h"
#include "dfqvit/torch_dispatch.h"

namespace dfqvit {
namespace quant {
namespace {

constexpr int64_t kBufferBytes = 1 << 19;  // of quantized rows a thread works on
constexpr size_t kStreamBytes = 8 << 20;   // from this size on a float32 result is written past the caches
constexpr int64_t kLeastRows = 64, kMostRows = 1024;

using Optional = std::optional<at::Tensor>;

// A large result of its own pages costs more in page faults than in arithmetic: huge pages, where the system grants
// them.
void ask_for_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 1 << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) + tensor.nbytes()) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

Type type_of(at::ScalarType type) {
  return type == at::kFloat ? Type::f32 : type == at::kBFloat16 ? Type::bf16 : type == at::kHalf ? Type::f16 : Type::u8;
}

float scale_value(const char* name, float value) {
  TORCH_CHECK_VALUE(std::isfinite(value), name, " held NaN or Inf; every value must be finite");
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

// The input: floats to be quantized, or the integers.
struct Input {
  const at::Tensor tensor;
  Type type;
  int64_t rows, columns, stride;  // stride: bytes from row to row once quantized and padded
  Quantizer quantizer;
  const Kernels& kernels;

  bool ready() const { return type == Type::u8 && columns == stride; }
  const uint8_t* row(int64_t r) const {
    return static_cast<const uint8_t*>(tensor.const_data_ptr()) + r * columns * tensor.element_size();
  }
  // Rows [begin, end) as padded integers at `out`; false when one was not finite.
  bool prepare(int64_t begin, int64_t end, uint8_t* out) const {
    if (type != Type::u8) return kernels.quantize(row(begin), type, end - begin, columns, quantizer, out, stride);
    for (int64_t r = begin; r < end; ++r, out += stride) {
      std::memcpy(out, row(r), columns);
      std::memset(out + columns, 0, stride - columns);
    }
    return true;
  }
};

// All the rows times all the outputs. False when a value of x was not finite.
bool run(const Input& input, const Weight& weight, Epilogue e, int64_t blocks) {
  std::atomic<bool> finite{true};
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads(), rows = input.rows;
  const int64_t depth = std::max<int64_t>(input.stride, 1);
  int64_t most = std::clamp(kBufferBytes / depth / 32 * 32, kLeastRows, kMostRows);
  if (rows >= threads * 2 * kLeastRows || threads == 1) {
    const int64_t share = (rows + threads - 1) / threads;               // of a thread,
    const int64_t parts = (share + most - 1) / most;                    // in so many row blocks,
    const int64_t size = ((share + parts - 1) / parts + 31) / 32 * 32;  // of whole tiles
    at::parallel_for(0, (rows + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
      const int64_t buffer = input.ready() ? 0 : size * input.stride;
      uint8_t* scratch = thread_memory(buffer + weight.scratch_bytes());
      Epilogue mine = e;
      for (int64_t part = begin; part < end; ++part) {
        const int64_t first = part * size, last = std::min(first + size, rows);
        const uint8_t* a = input.ready() ? input.row(first) : scratch;
        if (!input.ready() && !input.prepare(first, last, scratch)) finite = false;
        mine.first_row = first;
        input.kernels.linear(a, input.stride, last - first, weight, 0, blocks, scratch + buffer, mine);
      }
    });
    return finite;
  }
  at::Tensor shared;
  const uint8_t* a = input.ready() ? input.row(0) : nullptr;
  if (!input.ready()) {
    shared = at::empty({std::max<int64_t>(rows * input.stride, 1)}, at::kByte);
    uint8_t* out = shared.mutable_data_ptr<uint8_t>();
    a = out;
    at::parallel_for(0, rows, std::max<int64_t>(1, (1 << 14) / depth), [&](int64_t begin, int64_t end) {
      if (!input.prepare(begin, end, out + begin * input.stride)) finite = false;
    });
  }
  e.first_row = 0;
  at::parallel_for(0, (blocks + 1) / 2, 1, [&](int64_t begin, int64_t end) {
    uint8_t* scratch = thread_memory(weight.scratch_bytes());
    input.kernels.linear(a, input.stride, rows, weight, 2 * begin, std::min(2 * end, blocks), scratch, e);
  });
  return finite;
}

at::Tensor quant_linear(const at::Tensor& x, const at::Tensor& weight, const Optional& bias, const Optional& acm,
                        const at::Tensor& x_scale, const at::Tensor& x_zero, const at::Tensor& w_scale, int64_t a_bits,
                        int64_t w_bits, c10::string_view activation, const Optional& residual,
                        const Optional& out_scale, const Optional& out_zero, int64_t out_bits,
                        at::ScalarType out_dtype) {
  const int64_t columns = x.size(-1), outputs = w_scale.numel(), greatest = (1 << a_bits) - 1;
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = outputs;

  const at::Tensor w_scales = w_scale.contiguous();
  const float* scales = w_scales.const_data_ptr<float>();
  const float step = scale_value("x_scale", *x_scale.const_data_ptr<float>());
  const float zero = whole_value("x_zero", *x_zero.const_data_ptr<float>(), greatest);
  bool ordinary = ordinary_divisor(step);
  for (int64_t n = 0; n < outputs; ++n) scale_value("w_scale", scales[n]);

  const bool given = weight.scalar_type() == at::kInt;
  const at::Tensor blocks = given ? weight.contiguous() : blocked(weight, scales, columns, w_bits);
  const int64_t chunks = (columns + kDepth - 1) / kDepth;
  const Weight packed{blocks.const_data_ptr<int32_t>(), blocks.size(1), chunks,
                      !given || w_bits > 4 ? 8
                      : w_bits == 4        ? 4
                                           : 3};

  const auto floats = [](const Optional& t) { return t ? t->to(at::kFloat).contiguous() : at::Tensor(); };
  const at::Tensor biases = floats(bias), corrections = floats(acm), out_scales = floats(out_scale),
                   out_zeros = floats(out_zero), addend = residual ? residual->contiguous() : at::Tensor();
  std::vector<Columns> constants(blocks.size(0));
  for (int64_t n = 0; n < blocks.size(0) * kOutputs; ++n) {
    Columns& c = constants[n / kOutputs];
    const int64_t i = n % kOutputs;
    const bool real = n < outputs;
    c.scale[i] = real ? step * scales[n] : 0.0f;
    c.start[i] = -static_cast<int32_t>(zero) * packed.sums(n / kOutputs)[i];
    c.bias[i] = real && bias ? biases.const_data_ptr<float>()[n] : 0.0f;
    c.out_scale[i] = real && out_scale ? scale_value("out_scale", out_scales.const_data_ptr<float>()[n]) : 1.0f;
    c.out_zero[i] =
        real && out_zero ? whole_value("out_zero", out_zeros.const_data_ptr<float>()[n], (1 << out_bits) - 1) : 0.0f;
    c.out_reciprocal[i] = 1.0f / c.out_scale[i];
    ordinary = ordinary && ordinary_divisor(c.out_scale[i]);
  }

  const Kernels kernels = kernels_for(ordinary ? active_isa() : Isa::portable);
  const Quantizer quantizer{step, 1.0f / step, zero, static_cast<float>(greatest)};
  const Input input{x.contiguous(), type_of(x.scalar_type()), rows, columns, chunks * kDepth, quantizer, kernels};
  if (input.type == Type::u8 && a_bits < 8) {
    uint8_t most = 0;
    for (int64_t i = 0; i < rows * columns; ++i) most = std::max(most, input.row(0)[i]);
    whole_value("x", most, greatest);
  }
  at::Tensor result = at::empty(shape, x.options().dtype(out_dtype));
  ask_for_huge_pages(result);
  Epilogue e{};
  e.columns = constants.data();
  e.out_features = e.out_stride = outputs;
  e.activation = activation == "gelu"        ? Activation::gelu
                 : activation == "gelu_tanh" ? Activation::gelu_tanh
                                             : Activation::none;
  e.acm = acm ? corrections.const_data_ptr<float>() : nullptr;
  e.tokens = acm ? acm->size(0) : 1;
  e.residual = residual ? addend.const_data_ptr() : nullptr;
  e.residual_type = residual ? type_of(addend.scalar_type()) : Type::f32;
  e.out = result.mutable_data_ptr();
  e.type = type_of(out_dtype);
  e.stream = e.type == Type::f32 && result.nbytes() >= kStreamBytes && outputs % kOutputs == 0 &&
             reinterpret_cast<uintptr_t>(e.out) % 64 == 0;
  e.out_greatest = static_cast<float>((1 << out_bits) - 1);
  if (rows > 0 && outputs > 0) {
    TORCH_CHECK_VALUE(run(input, packed, e, blocks.size(0)), "x held NaN or Inf; every value must be finite");
  }
  return result;
}

}  // namespace
}  // namespace quant
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(dfqvit_cpu, CPU, m) {
  m.impl("quant_linear", &dfqvit::quant::quant_linear);
}
