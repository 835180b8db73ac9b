// dfqvit_cuda::quant_linear: memory for the kernels of quant_linear_kernels.cu. Scales and zero points are read on the
// device only, so nothing waits for the GPU. Values are not checked here.
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string_view>
#include <vector>

#include "dfqvit/build.h"
#include "dfqvit/quant_linear_launch.h"
#include "dfqvit/torch_dispatch_cuda.h"

namespace dfqvit {
namespace quant {
namespace tile {
namespace {

using Optional = std::optional<at::Tensor>;

Type type_of(at::ScalarType type) {
  return type == at::kFloat ? Type::f32 : type == at::kBFloat16 ? Type::bf16 : type == at::kHalf ? Type::f16 : Type::u8;
}

bool aligned(const at::Tensor& tensor, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

// A tensor [..., columns] of bytes, ready to be read in chunks: in rows that are a multiple of `unit` long.
at::Tensor whole_chunks(const at::Tensor& bytes, int64_t unit) {
  const int64_t missing = (unit - bytes.size(-1) % unit) % unit;
  if (missing != 0) return at::constant_pad_nd(bytes, {0, missing});
  return aligned(bytes, kChunk) ? bytes.contiguous() : bytes.clone(at::MemoryFormat::Contiguous);
}

const float* floats(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
}

// x [..., columns] as bytes in rows that are a multiple of 16 long.
at::Tensor quantize_rows(const at::Tensor& x, int64_t rows, int64_t columns, const Quantizer& quantizer,
                         cudaStream_t stream) {
  const int64_t stride = (columns + kChunk - 1) / kChunk * kChunk;
  at::Tensor out = at::empty({rows, stride}, x.options().dtype(at::kByte));
  if (out.numel() == 0) return out;
  uint8_t* data = out.mutable_data_ptr<uint8_t>();
  DFQVIT_DISPATCH_FLOATS(x.scalar_type(), "quant_linear", [&] {
    using Element = DeviceType<scalar_t>;
    C10_CUDA_CHECK(launch_quantize_rows(reinterpret_cast<const Element*>(x.const_data_ptr<scalar_t>()), rows, columns,
                                        quantizer, data, stride, stream));
  });
  return out;
}

// From so many rows of tiles on, each of which would unpack the weights anew, they are unpacked once.
constexpr int64_t kUnpackRows = 16 * Large::kM;

// Packed weights in whole chunks, as bytes.
at::Tensor unpacked(const at::Tensor& weight, int64_t bits, cudaStream_t stream) {
  const int64_t across = weight.size(1) / (2 * bits), chunks = weight.size(0) * across;
  at::Tensor out = at::empty({weight.size(0), across * kChunk}, weight.options());
  if (chunks == 0) return out;
  C10_CUDA_CHECK(launch_unpack(weight.const_data_ptr<uint8_t>(), bits, weight.size(1), chunks,
                               out.mutable_data_ptr<uint8_t>(), stream));
  return out;
}

int attribute(cudaDeviceAttr name, const at::Tensor& x) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, x.device().index()));
  return value;
}

// What multiplies. By wgmma: compute capability 9.0, code for sm_90a, and enough tiles (`filled`). The variable
// DFQVIT_WGMMA decides otherwise: 0 never, 1 for every size, "tiles" for every size and, with weights of 8 bits, by
// copies of whole tiles, which have not been measured yet.
Product product_for(const at::Tensor& x, bool filled, int64_t bits) {
  constexpr bool kCompiled = std::string_view(DFQVIT_CUDA_ARCHS).find("9.0a") != std::string_view::npos;
  const char* choice = std::getenv("DFQVIT_WGMMA");
  const std::string_view wish = choice ? choice : "";
  TORCH_CHECK(wish.empty() || wish == "0" || wish == "1" || wish == "tiles", "DFQVIT_WGMMA was '", std::string(wish),
              "'; it may be 0 (never), 1 (for every size), tiles (the same, by copies of whole tiles) or unset");
  const bool able = kCompiled && attribute(cudaDevAttrComputeCapabilityMajor, x) == 9 &&
                    attribute(cudaDevAttrComputeCapabilityMinor, x) == 0;
  const bool wanted = wish == "1" || wish == "tiles";
  TORCH_CHECK(able || !wanted, "DFQVIT_WGMMA was ", std::string(wish),
              ", but wgmma needs a GPU of compute capability 9.0 and a build for 9.0a "
              "(TORCH_CUDA_ARCH_LIST); the build is for " DFQVIT_CUDA_ARCHS);
  if (!able || wish == "0" || !(filled || wanted)) return Product::mma_sync;
  return wish == "tiles" && bits == 8 ? Product::wgmma_of_tiles : Product::wgmma;
}

at::Tensor quant_linear(const at::Tensor& x, const at::Tensor& weight, const Optional& bias, const Optional& acm,
                        const at::Tensor& x_scale, const at::Tensor& x_zero, const at::Tensor& w_scale, int64_t a_bits,
                        int64_t w_bits, c10::string_view activation, const Optional& residual,
                        const Optional& out_scale, const Optional& out_zero, int64_t out_bits,
                        c10::string_view out_type, const Optional& w_sums) {
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const int64_t columns = x.size(-1), outputs = w_scale.numel();
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = outputs;
  const at::ScalarType out_dtype = dtype_named(out_type);
  at::Tensor result = at::empty(shape, x.options().dtype(out_dtype));
  if (result.numel() == 0) return result;
  TORCH_CHECK(std::max({rows, columns, outputs}) <= std::numeric_limits<int32_t>::max() - Large::kM,
              "quant_linear: x, or the result, had more rows or columns than CUDA takes");

  const Quantizer quantizer{floats(x_scale), 0, floats(x_zero), 0.0f, static_cast<float>((1 << a_bits) - 1)};
  const at::Tensor a = x.scalar_type() == at::kByte ? whole_chunks(x, kChunk)
                                                    : quantize_rows(x.contiguous(), rows, columns, quantizer, stream);
  const at::Tensor w_scales = w_scale.contiguous();
  const bool packed = weight.scalar_type() == at::kByte;
  int64_t bits = packed ? w_bits : 8;
  const float half = static_cast<float>(1 << (w_bits - 1));
  const Quantizer w_quantizer{floats(w_scales), 1, nullptr, -half, half - 1};
  at::Tensor b = packed ? whole_chunks(weight, 2 * bits)
                        : quantize_rows(weight.contiguous(), outputs, columns, w_quantizer, stream);
  if (bits < 8 && rows >= kUnpackRows) {
    b = unpacked(b, bits, stream);
    bits = 8;
  }
  const Operands operands{a.const_data_ptr<uint8_t>(), static_cast<int>(a.size(-1)), b.const_data_ptr<uint8_t>(),
                          static_cast<int>(b.size(1)), static_cast<int>(rows),       static_cast<int>(outputs),
                          static_cast<int>(columns)};

  at::Tensor sums;
  if (packed && w_sums) {
    sums = w_sums->contiguous();
  } else {
    sums = at::empty({outputs}, w_scales.options().dtype(at::kInt));
    C10_CUDA_CHECK(launch_sums(operands, bits, sums.mutable_data_ptr<int32_t>(), stream));
  }

  const auto as_floats = [](const Optional& t) { return t ? t->to(at::kFloat).contiguous() : at::Tensor(); };
  const at::Tensor biases = as_floats(bias), corrections = as_floats(acm), out_scales = as_floats(out_scale),
                   out_zeros = as_floats(out_zero), addend = residual ? residual->contiguous() : at::Tensor();
  Epilogue e{};
  e.x_scale = floats(x_scale);
  e.x_zero = floats(x_zero);
  e.w_scale = floats(w_scales);
  e.w_sums = sums.const_data_ptr<int32_t>();
  e.bias = floats(biases);
  e.acm = floats(corrections);
  e.tokens = acm ? static_cast<int>(acm->size(0)) : 1;
  e.activation = activation == "gelu"         ? Activation::gelu
                 : activation == "gelu_tanh"  ? Activation::gelu_tanh
                 : activation == "quick_gelu" ? Activation::quick_gelu
                 : activation == "silu"       ? Activation::silu
                                              : Activation::none;
  e.residual = residual ? addend.const_data_ptr() : nullptr;
  e.residual_type = residual ? type_of(addend.scalar_type()) : Type::f32;
  e.out_scale = floats(out_scales);
  e.out_zero = floats(out_zeros);
  e.out_greatest = static_cast<float>((1 << out_bits) - 1);
  e.out = result.mutable_data_ptr();
  e.type = type_of(out_dtype);
  e.whole = outputs % 4 == 0 && aligned(result, 16) && (!acm || aligned(corrections, 16)) &&
            (!residual || aligned(addend, 16));
  prepare(e);

  const int processors = attribute(cudaDevAttrMultiProcessorCount, x);
  const bool filled = tile_count<Large>(rows, outputs) >= processors;
  const Product product = product_for(x, filled, bits);
  if (product == Product::wgmma_of_tiles) {
    C10_CUDA_CHECK(launch_multiply_tiles(operands, e, processors, stream));
  } else if (product == Product::wgmma) {
    C10_CUDA_CHECK(launch_multiply<Group>(bits, operands, e, processors, stream));
  } else if (filled) {
    C10_CUDA_CHECK(launch_multiply<Large>(bits, operands, e, processors, stream));
  } else {  // four times the tiles, where large ones leave some multiprocessors idle
    C10_CUDA_CHECK(launch_multiply<Small>(bits, operands, e, processors, stream));
  }
  return result;
}

}  // namespace
}  // namespace tile
}  // namespace quant
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(DFQVIT_OPERATORS(cuda), CUDA, m) {
  m.impl("quant_linear", &dfqvit::quant::tile::quant_linear);
}
