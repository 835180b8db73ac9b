// The CPU kernels of patch_similarity_entropy for every path: what they work on, and the table of them. No torch
// headers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dfqvit/patch_similarity_entropy.h"
#include "dfqvit/simd.h"

namespace dfqvit {
namespace entropy {

// The normalised vectors of one set.
struct Set {
  const float* unit;  // [n, stride], zero from column `depth` on
  int64_t n, depth, stride;

  int64_t tiles() const { return (n + kTile - 1) / kTile; }
  int tile_size(int64_t tile) const { return static_cast<int>(n - tile * kTile < kTile ? n - tile * kTile : kTile); }
};

// What the density needs of Places, laid out for the inner loops. `factors` (slope_factor) for the backward only.
struct Gaussians {
  Places where;
  const float* places;
  const float* factors;
  int32_t points;
  float scale, inverse_step;

  Span span(float low, float high) const { return where.span(low, high, inverse_step); }
};

// Working memory of one thread.
struct Scratch {
  float* panel;  // [depth, kTile]
  float* tile;   // [kTile, kTile]
  float* lanes;  // [points, 16]
};

// The entry points of one path; patch_similarity_entropy_body.h says what each does.
struct Kernels {
  void (*range_of_panel)(const Set&, int64_t panel, Scratch&, float* ends);
  void (*density_of_panel)(const Set&, int64_t panel, const Gaussians&, Scratch&, double* sums);
  void (*backward_of_set)(const Set&, const Gaussians&, Scratch&, float* grad);
  void (*backward_of_rows)(const Set&, int64_t tile, const Gaussians&, Scratch&, float* grad);
};

}  // namespace entropy
}  // namespace dfqvit

#define DFQVIT_PATH portable
#define DFQVIT_TARGET
#include "dfqvit/patch_similarity_entropy_body.h"
#undef DFQVIT_PATH
#undef DFQVIT_TARGET

#if DFQVIT_X86
#define DFQVIT_PATH avx2
#define DFQVIT_TARGET DFQVIT_TARGET_AVX2
#include "dfqvit/patch_similarity_entropy_body.h"
#undef DFQVIT_PATH
#undef DFQVIT_TARGET

#define DFQVIT_PATH avx512
#define DFQVIT_TARGET DFQVIT_TARGET_AVX512
#include "dfqvit/patch_similarity_entropy_body.h"
#undef DFQVIT_PATH
#undef DFQVIT_TARGET
#endif

#if DFQVIT_ARM
#define DFQVIT_PATH neon
#define DFQVIT_TARGET
#include "dfqvit/patch_similarity_entropy_body.h"
#undef DFQVIT_PATH
#undef DFQVIT_TARGET
#endif

namespace dfqvit {
namespace entropy {

inline const Kernels& kernels_for(Isa isa) {
#if DFQVIT_X86
  if (isa >= Isa::avx512) return avx512::kKernels;
  if (isa == Isa::avx2) return avx2::kKernels;
#elif DFQVIT_ARM
  if (isa != Isa::portable) return neon::kKernels;
#endif
  (void)isa;
  return portable::kKernels;
}

}  // namespace entropy
}  // namespace dfqvit
