// The CPU kernels of gate_quantize for every path: the activation, the product and the rounding to integers in one
// pass. No torch headers.
#pragma once

#include "dfqvit/quant_linear.h"

namespace dfqvit {
namespace quant {

// What a gated MLP's hidden values are made and rounded by, and those of a response norm, whose factors are the gate.
struct Gate {
  int64_t channels;
  Activation activation;
  float slope;              // of Activation::swish
  const float* scale;       // of each channel, and ones up to a multiple of kGateStep
  const float* reciprocal;  // 1 / scale, as float32 division gives it
  float zero, greatest;
  const float* offset;  // added to the products, as many as scales; or null
};

constexpr int64_t kGateStep = 64;

}  // namespace quant
}  // namespace dfqvit

#define DFQVIT_BODY "dfqvit/gate_quantize_body.h"
#include "dfqvit/each_path.h"

namespace dfqvit {
namespace quant {

// Rows of two halves, `gate_stride` and `value_stride` floats from row to row, to bytes, `out_stride` from row to row.
// False when a value was NaN or Inf.
using GateKernel = bool (*)(const float* gate, int64_t gate_stride, const float* value, int64_t value_stride,
                            int64_t rows, const Gate&, uint8_t* out, int64_t out_stride);

// Defined in csrc/cpu/gate_quantize_kernels.cpp, so that the paths are compiled there alone.
GateKernel gate_kernel_for(Isa isa);

}  // namespace quant
}  // namespace dfqvit
