// The CPU kernels of quant_attention for every path. Both products are quant_linear's (quant_linear.h): keys and values
// are packed like an 8-bit weight, so that K^T and V are its blocks. No torch headers.
#pragma once

#include <limits>

#include "dfqvit/quant_linear.h"

namespace dfqvit {
namespace quant {

constexpr int64_t kStripRows = 32;  // queries whose scores stand in the first cache at once

// What all heads share.
struct Heads {
  int64_t tokens, depth;             // N of a window and D of a head
  int64_t key_chunks, value_chunks;  // of D and of N, in chunks of 64
  float factor;                      // softmax scale * q_scale * k_scale
  float v_scale;
  int32_t v_zero;      // of V as signed bytes
  Quantizer out;       // where the result is bytes
  int64_t out_stride;  // elements from token to token
};

// One head of one window.
struct Head {
  const uint8_t* queries;  // [N, key_chunks * 64]
  Weight keys, values;
  const int32_t* key_offsets;  // q_zero * sum_d k, for each key, padded to a block
  const float *bias, *mask;    // [N, N] or null
  const int32_t* index;        // the tokens of the window, or null for 0, 1, 2, ...
  uint8_t* out_bytes;          // row 0 of the image, at this head's first column; one of the two is null
  float* out_floats;
};

// Scratch of one thread for a strip of queries.
struct Strip {
  float* scores;    // [kStripRows, N padded to a block]
  uint8_t* steps;   // [kStripRows, value_chunks * 64]
  int32_t* totals;  // [kStripRows]
};

}  // namespace quant
}  // namespace dfqvit

#define DFQVIT_PATH portable
#define DFQVIT_SIMD portable
#define DFQVIT_TARGET
#include "dfqvit/quant_attention_body.h"
#undef DFQVIT_PATH
#undef DFQVIT_SIMD
#undef DFQVIT_TARGET

#if DFQVIT_X86
#define DFQVIT_PATH avx2
#define DFQVIT_SIMD avx2
#define DFQVIT_TARGET DFQVIT_TARGET_AVX2
#include "dfqvit/quant_attention_body.h"
#undef DFQVIT_PATH
#undef DFQVIT_SIMD
#undef DFQVIT_TARGET

#define DFQVIT_PATH avx512
#define DFQVIT_SIMD avx512
#define DFQVIT_TARGET DFQVIT_TARGET_VNNI
#include "dfqvit/quant_attention_body.h"
#undef DFQVIT_PATH
#undef DFQVIT_SIMD
#undef DFQVIT_TARGET

#define DFQVIT_PATH amx
#define DFQVIT_SIMD avx512
#define DFQVIT_TARGET DFQVIT_TARGET_AMX
#include "dfqvit/quant_attention_body.h"
#undef DFQVIT_PATH
#undef DFQVIT_SIMD
#undef DFQVIT_TARGET
#endif

namespace dfqvit {
namespace quant {

using Attend = void (*)(const Head&, const Heads&, int64_t begin, int64_t end, Strip);

inline Attend attend_for(Isa isa) {
#if DFQVIT_X86
  if (isa == Isa::amx) return amx::attend;
  if (isa == Isa::avx512 && has_avx512_vnni()) return avx512::attend;
  if (isa >= Isa::avx2) return avx2::attend;
#endif
  (void)isa;
  return portable::attend;
}

}  // namespace quant
}  // namespace dfqvit
