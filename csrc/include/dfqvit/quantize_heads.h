// The CPU kernels of quantize_heads for every path: a token's heads are rotated and become bytes while they are in the
// cache. No torch headers.
#pragma once

#include "dfqvit/quant_linear.h"

namespace dfqvit {
namespace quant {

// Q, K or V of one token: `heads` vectors of `depth` floats, `stride` floats from one to the next. `unit`: each is
// first brought to length 1, as in cosine attention; not with a rotation.
struct TokenHeads {
  const float* values;
  int64_t heads, depth, stride;
  bool unit;
};

// The rotation of one token: sines, then cosines, `depth` of each; `stride` floats from head to head, 0 where all share
// one. Null: none.
struct Rotation {
  const float* sines;
  int64_t stride;
  bool half;  // partners lie depth / 2 apart, else side by side
};

}  // namespace quant
}  // namespace dfqvit

#define DFQVIT_BODY "dfqvit/quantize_heads_body.h"
#include "dfqvit/each_path.h"

namespace dfqvit {
namespace quant {

// [heads * depth] bytes; `line` is scratch of as many floats. False when a value was NaN or Inf.
using HeadsKernel = bool (*)(const TokenHeads&, const Rotation&, const Quantizer&, uint8_t* out, float* line);

// Defined in csrc/cpu/quantize_heads_kernels.cpp, so that the paths are compiled there alone.
HeadsKernel heads_kernel_for(Isa isa);

}  // namespace quant
}  // namespace dfqvit
