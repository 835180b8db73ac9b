// The CPU kernels of quant_linear for every path: what they work on, and the table of them. No torch headers.
//
// A product is made of tiles: some rows of integers, times 16 outputs (a block of kernels/quant_linear/blocked.py),
// summed in int32, and handed to a functor while they are in the first cache. The standard one is `Standard`
// (quant_linear_body.h); another fused operator brings its own and calls quant::<path>::gemm.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "dfqvit/isa.h"
#include "dfqvit/simd_convert.h"

namespace dfqvit {
namespace quant {

constexpr int kOutputs = 16;               // of a block
constexpr int kDepth = 64;                 // of a chunk: K is padded to a multiple of it
constexpr int kChunk = kOutputs * kDepth;  // bytes of a chunk of one block, unpacked

inline int64_t blocks_of(int64_t outputs) {
  return (outputs + kOutputs - 1) / kOutputs;
}
inline int64_t chunks_of(int64_t depth) {
  return (depth + kDepth - 1) / kDepth;
}

enum class Type : int { f32, bf16, f16, u8 };
enum class Activation : int { none, gelu, gelu_tanh, swish };  // the last: y * sigmoid(slope * y)

// A blocked weight: rows of int32, each with 16 sums over k and then the values.
struct Weight {
  const int32_t* rows;
  int64_t stride;  // int32 from row to row
  int64_t depth;   // K
  int64_t chunks;  // of K
  int bits;        // 8, 4 or 3, as stored
  int fits = 8;    // bits that each weight fits, as a signed integer

  const int32_t* sums(int64_t block) const { return rows + block * stride; }
  const uint8_t* values(int64_t block) const { return reinterpret_cast<const uint8_t*>(sums(block) + kOutputs); }
  int64_t scratch_bytes(int64_t blocks) const {  // that gemm needs, at a multiple of 64
    return bits == 8 ? 0 : blocks * chunks * kChunk;
  }
};

// Rows of `depth` bytes that meet all blocks, `weight` bytes, before the next rows do. Where the weights fit the second
// cache, as many as fit the first; else the weights come from further away, and more rows share the journey.
inline int64_t part_rows(int64_t depth, int64_t weight, int64_t tile) {
  depth = std::max<int64_t>(depth, 1);
  const int64_t rows = weight <= 1 << 20 ? (24 << 10) / depth : std::max<int64_t>((256 << 10) / depth, 128);
  return std::max<int64_t>(1, rows / tile) * tile;
}

// Float to integer: clamp(round(x / scale) + zero, 0, greatest).
struct Quantizer {
  float scale, reciprocal, zero, greatest;  // reciprocal = 1 / scale, as float32 division gives it
};

// What the epilogue multiplies and adds for one block. Outputs that do not exist have 1 for out_scale and its
// reciprocal, 0 elsewhere.
struct alignas(64) Columns {
  float scale[kOutputs];           // x_scale * w_scale
  int32_t start[kOutputs];         // -x_zero * sum_k qw
  float bias[kOutputs];            // 0 for none
  float out_scale[kOutputs];       // the last three for Type::u8 only
  float out_reciprocal[kOutputs];  // 1 / out_scale, as float32 division gives it
  float out_zero[kOutputs];
};

// From the integer sums to the result: scale, offset, bias, acm, activation, residual, and the conversion to `type`.
struct Epilogue {
  const Columns* columns;  // of block 0
  int64_t out_features;
  Activation activation;
  float slope;      // of Activation::swish
  const void* acm;  // of `tokens` rows, or null
  Type acm_type;
  int64_t tokens, acm_row, acm_block;  // elements from row to row and from block to block of acm
  const void* residual;                // row 0 of the result; [rows, out_features] or null
  Type residual_type;
  void* out;  // row 0 of the result
  Type type;
  int64_t out_stride;  // elements
  float out_greatest;
  bool stream;        // Type::f32 only: past the caches; `out` and its rows then lie at multiples of 64 bytes
  int64_t first_row;  // the row of the result that row 0 of the product is
};

}  // namespace quant
}  // namespace dfqvit

#include "dfqvit/quant_linear_multiply.h"

#define DFQVIT_BODY "dfqvit/quant_linear_body.h"
#define DFQVIT_WITH_PRODUCTS
#include "dfqvit/each_path.h"

namespace dfqvit {
namespace quant {

// The entry points of one path; quant_linear_body.h says what each does.
struct Kernels {
  bool (*quantize)(const void* x, Type type, int64_t rows, int64_t columns, const Quantizer&, uint8_t* out,
                   int64_t out_stride);
  void (*linear)(const uint8_t* a, int64_t stride, int64_t rows, const Weight&, int64_t begin, int64_t end,
                 uint8_t* scratch, const Epilogue&);
};

// Defined in csrc/cpu/quant_linear_kernels.cpp, so that the paths are compiled there alone.
Kernels kernels_for(Isa isa);

// Whether the fast quotients are exact for this divisor; the portable path divides, and is right for any.
inline bool ordinary_divisor(float divisor) {
  return divisor >= simd::kLeastDivisor && divisor <= simd::kGreatestDivisor;
}

}  // namespace quant
}  // namespace dfqvit
