// The CPU kernels of layer_norm_quantize for every path: LayerNorm and the rounding to integers in one pass, each row
// from the cache it was read into. No torch headers.
#pragma once

#include <cmath>

#include "dfqvit/quant_linear.h"

namespace dfqvit {
namespace quant {

constexpr int kNormedTogether = 4;  // rows whose sums grow side by side: those of one wait for each other

struct Norm {
  const float* weight;
  const float* bias;
  int64_t channels;
  float eps;
  Quantizer out;

  // A row's floats in whole runs of 16; and of rows side by side, the scratch that a thread needs.
  int64_t line() const { return (channels + kOutputs - 1) / kOutputs * kOutputs; }
  int64_t scratch() const { return kNormedTogether * line(); }
};

}  // namespace quant
}  // namespace dfqvit

#define DFQVIT_BODY "dfqvit/layer_norm_quantize_body.h"
#include "dfqvit/each_path.h"

namespace dfqvit {
namespace quant {

// The entry points of one path.
struct NormKernels {
  // Rows of `type` to bytes, `stride` bytes from row to row. False when a row's mean was not finite.
  bool (*quantize)(const void* x, Type type, int64_t rows, const Norm&, uint8_t* out, int64_t stride, float* scratch);
  // Rows [rows, channels] to what is normalised plus the residual, without rounding; `out` may be the residual.
  void (*add)(const float* x, int64_t rows, const Norm&, const float* residual, float* out, float* scratch);
};

// Defined in csrc/cpu/layer_norm_quantize_kernels.cpp, so that the paths are compiled there alone.
NormKernels norm_kernels_for(Isa isa);

}  // namespace quant
}  // namespace dfqvit
