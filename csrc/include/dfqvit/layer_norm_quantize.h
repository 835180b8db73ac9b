// The CPU kernels of layer_norm_quantize for every path: LayerNorm and the rounding to integers in one pass, each row
// from the cache it was read into. No torch headers.
#pragma once

#include <cmath>

#include "dfqvit/quant_linear.h"

namespace dfqvit {
namespace quant {

struct Norm {
  const float* weight;
  const float* bias;
  int64_t channels;
  float eps;
  Quantizer out;

  // floats of scratch that a thread needs
  int64_t line() const { return (channels + kOutputs - 1) / kOutputs * kOutputs; }
};

}  // namespace quant
}  // namespace dfqvit

#define DFQVIT_BODY "dfqvit/layer_norm_quantize_body.h"
#include "dfqvit/each_path.h"

namespace dfqvit {
namespace quant {

// Rows of `type` to bytes, `stride` bytes from row to row; `line` is the scratch.
using NormKernel = void (*)(const void* x, Type type, int64_t rows, const Norm&, uint8_t* out, int64_t stride,
                            float* line);

inline NormKernel norm_kernel_for(Isa isa) {
#if DFQVIT_X86
  if (isa >= Isa::avx512 && has_avx512_vnni()) return avx512::norm;
  if (isa >= Isa::avx2) return avx2::norm;
#endif
  (void)isa;
  return portable::norm;
}

}  // namespace quant
}  // namespace dfqvit
