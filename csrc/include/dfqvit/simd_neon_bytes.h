// The part of dfqvit/simd_bytes.h for 64-bit ARM, which includes it. No torch headers.
#pragma once

#include "dfqvit/simd_convert.h"  // bytes_of

namespace dfqvit {
namespace simd {
namespace neon {

#define DFQVIT_INLINE inline __attribute__((always_inline))
DFQVIT_INLINE vec exp2_coarse(vec t) {
  const vec u = max(t, broadcast(-64.0f)), whole = vrndmq_f32(u), f = sub(u, whole);
  vec p = fma(broadcast(kCoarseExp2[4]), f, broadcast(kCoarseExp2[3]));
  p = fma(p, f, broadcast(kCoarseExp2[2]));
  p = fma(p, f, broadcast(kCoarseExp2[1]));
  p = fma(p, f, broadcast(kCoarseExp2[0]));
  const int32x4_t power = vshlq_n_s32(vcvtq_s32_f32(whole), 23);  // into the exponent of p
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), power));
}
template <int n>
DFQVIT_INLINE void store_bytes(uint8_t* p, const vec* a) {
  static_assert(n % 4 == 0, "");
  for (int i = 0; i < n; i += 4) {
    int32x4_t q[4];
    for (int v = 0; v < 4; ++v) q[v] = vcvtnq_s32_f32(a[i + v]);
    vst1q_u8(p + 4 * i, bytes_of(q));
  }
}
DFQVIT_INLINE int32_t sum_bytes(const uint8_t* p, const int8_t* ones, int64_t chunks) {
  uint32x4_t total = vdupq_n_u32(0);
  for (int64_t i = 0; i < 64 * chunks; i += 16) {
    const uint8x16_t kept = vmulq_u8(vld1q_u8(p + i), vreinterpretq_u8_s8(vld1q_s8(ones + i)));
    total = vpadalq_u16(total, vpaddlq_u8(kept));
  }
  return static_cast<int32_t>(vaddvq_u32(total));
}
// 16 bytes with their highest bits flipped: x - 128 as signed bytes.
DFQVIT_INLINE int8x16_t load_signed(const uint8_t* p) {
  return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(0x80)));
}
// n rows of `count` bytes, copied where they do not fill 64: with what becomes 0.
template <int n>
struct WholeRows {
  uint8_t copies[n][64];
  const uint8_t* rows[n];

  DFQVIT_INLINE WholeRows(const uint8_t* const* from, int64_t count) {
    for (int i = 0; i < n; ++i) {
      rows[i] = from[i];
      if (count >= 64) continue;
      std::memset(copies[i], 0x80, 64);
      std::memcpy(copies[i], from[i], count);
      rows[i] = copies[i];
    }
  }
};
DFQVIT_INLINE void pack_outputs(const uint8_t* const* from, int64_t count, uint8_t* to, int32_t* sums) {
  const WholeRows<16> whole(from, count);
  for (int n = 0; n < 16; n += 4) {  // outputs n to n + 3: words of 32 bits, transposed 4 x 4
    const uint8_t* const* rows = whole.rows + n;
    int32x4_t total = vld1q_s32(sums + n);
    for (int k = 0; k < 64; k += 16) {
      const int32x4_t r0 = vreinterpretq_s32_s8(load_signed(rows[0] + k));
      const int32x4_t r1 = vreinterpretq_s32_s8(load_signed(rows[1] + k));
      const int32x4_t r2 = vreinterpretq_s32_s8(load_signed(rows[2] + k));
      const int32x4_t r3 = vreinterpretq_s32_s8(load_signed(rows[3] + k));
      const int64x2_t even0 = vreinterpretq_s64_s32(vtrn1q_s32(r0, r1)),
                      odd0 = vreinterpretq_s64_s32(vtrn2q_s32(r0, r1));
      const int64x2_t even1 = vreinterpretq_s64_s32(vtrn1q_s32(r2, r3)),
                      odd1 = vreinterpretq_s64_s32(vtrn2q_s32(r2, r3));
      const int64x2_t words[4] = {vtrn1q_s64(even0, even1), vtrn1q_s64(odd0, odd1), vtrn2q_s64(even0, even1),
                                  vtrn2q_s64(odd0, odd1)};
      for (int w = 0; w < 4; ++w) {
        const int8x16_t bytes = vreinterpretq_s8_s64(words[w]);
        total = vpadalq_s16(total, vpaddlq_s8(bytes));
        vst1q_s8(reinterpret_cast<int8_t*>(to) + 16 * (k + 4 * w) + 4 * n, bytes);
      }
    }
    vst1q_s32(sums + n, total);
  }
}
DFQVIT_INLINE void pack_depths(const uint8_t* const* from, int64_t count, uint8_t* to, int64_t stride) {
  const WholeRows<4> whole(from, count);
  for (int64_t first = 0; first < count && first < 64; first += 16, to += stride) {
    int8x16x4_t four;
    for (int i = 0; i < 4; ++i) four.val[i] = load_signed(whole.rows[i] + first);
    vst4q_s8(reinterpret_cast<int8_t*>(to), four);
  }
}
#undef DFQVIT_INLINE
}  // namespace neon
}  // namespace simd
}  // namespace dfqvit
