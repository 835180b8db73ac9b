// What csrc/cuda/quant_linear_kernels.cu offers to the binding: its operands and launches. Pointers are to memory of
// the device. No torch headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dfqvit/quant_linear_tile.h"

namespace dfqvit {
namespace quant {
namespace tile {

// How floats become integers: row r has scale[r * step].
struct Quantizer {
  const float* scale;
  int step;
  const float* zero;  // null for 0
  float least, greatest;
};

// a [rows, depth] in rows of a_bytes, with zeros beyond depth; b [outputs, depth] packed, in rows of b_bytes. Whole
// chunks only: a_bytes is a multiple of 16, b_bytes of 2 * bits, and both start at multiples of 16. Weights beyond
// depth may be anything: they meet zeros.
struct Operands {
  const uint8_t* a;
  int a_bytes;
  const uint8_t* b;
  int b_bytes;
  int rows, outputs, depth;
};

// Which loop: the general one; to bytes of 8 bits; to the same after GELU; to float32, with a float32 residual or none
// and acm or none.
enum class Kind : int { general, bytes, gelu_bytes, floats };

struct Epilogue {
  const float* x_scale;  // both one value
  const float* x_zero;
  const float* w_scale;   // [outputs]
  const int32_t* w_sums;  // [outputs], of the integers of each row of the weight
  const float* bias;      // [outputs] or null
  const float* acm;       // [tokens, outputs] or null
  int tokens;
  Activation activation;
  const void* residual;  // [rows, outputs] of residual_type, or null
  Type residual_type;
  const float* out_scale;  // [outputs], for Type::u8 only
  const float* out_zero;
  float out_greatest;
  void* out;  // [rows, outputs]
  Type type;
  bool whole;  // outputs is a multiple of 4, and acm, residual and out start at multiples of 16
  Kind kind;   // this and the next by `prepare`
  float gelu[5];
};

// Sets what follows from the rest. On the host.
inline void prepare(Epilogue& e) {
  const bool bytes = e.whole && e.type == Type::u8 && e.out_greatest == 255.0f && !e.acm && !e.residual;
  const bool floats = e.whole && e.type == Type::f32 && e.activation == Activation::none &&
                      (!e.residual || e.residual_type == Type::f32);
  e.kind = bytes    ? (e.activation == Activation::none ? Kind::bytes : Kind::gelu_bytes)
           : floats ? Kind::floats
                    : Kind::general;
  const auto& coefficients = e.activation == Activation::gelu_tanh    ? kGeluTanh
                             : e.activation == Activation::quick_gelu ? kQuickGelu
                             : e.activation == Activation::silu       ? kSilu
                                                                      : kGelu;
  for (int i = 0; i < 5; ++i) e.gelu[i] = coefficients[i];
}

// Each gives the error of its launch. x [rows, columns] to out [rows, stride], zeros from `columns` on; T is float,
// __half or __nv_bfloat16.
template <typename T>
cudaError_t launch_quantize_rows(const T* x, int64_t rows, int64_t columns, const Quantizer& quantizer, uint8_t* out,
                                 int64_t stride, cudaStream_t stream);

// Packed weights of 2 to 7 bits, in `chunks` whole chunks of 16, to bytes.
cudaError_t launch_unpack(const uint8_t* weight, int64_t bits, int64_t row_bytes, int64_t chunks, uint8_t* out,
                          cudaStream_t stream);

// sums[n] = sum_k qw[n, k].
cudaError_t launch_sums(const Operands& operands, int64_t bits, int32_t* sums, cudaStream_t stream);

// The product in tiles of shape S (Small, Large or Group) with weights of `bits` bits, on so many multiprocessors.
template <typename S>
cudaError_t launch_multiply(int64_t bits, const Operands& operands, const Epilogue& epilogue, int processors,
                            cudaStream_t stream);
// The same in tiles of shape GroupOfTiles, with weights of 8 bits.
cudaError_t launch_multiply_tiles(const Operands& operands, const Epilogue& epilogue, int processors,
                                  cudaStream_t stream);

}  // namespace tile
}  // namespace quant
}  // namespace dfqvit
