// The part of dfqvit/simd.h for 64-bit ARM, which includes it: every such processor has these instructions. No torch
// headers.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace dfqvit {
namespace simd {
namespace neon {

#define DFQVIT_INLINE inline __attribute__((always_inline))
using vec = float32x4_t;
constexpr int kLanes = 4;
constexpr int kVectors = 4;  // of a register tile

DFQVIT_INLINE vec load(const float* p) {
  return vld1q_f32(p);
}
DFQVIT_INLINE void store(float* p, vec a) {
  vst1q_f32(p, a);
}
DFQVIT_INLINE vec broadcast(float a) {
  return vdupq_n_f32(a);
}
DFQVIT_INLINE vec add(vec a, vec b) {
  return vaddq_f32(a, b);
}
DFQVIT_INLINE vec sub(vec a, vec b) {
  return vsubq_f32(a, b);
}
DFQVIT_INLINE vec mul(vec a, vec b) {
  return vmulq_f32(a, b);
}
DFQVIT_INLINE vec fma(vec a, vec b, vec c) {  // a b + c
  return vfmaq_f32(c, a, b);
}
DFQVIT_INLINE vec fnma(vec a, vec b, vec c) {  // c - a b
  return vfmsq_f32(c, a, b);
}
// ARM's own minimum and maximum are NaN where either is.
DFQVIT_INLINE vec min(vec a, vec b) {  // b where either is NaN
  return vbslq_f32(vcltq_f32(a, b), a, b);
}
DFQVIT_INLINE vec max(vec a, vec b) {  // b where either is NaN
  return vbslq_f32(vcgtq_f32(a, b), a, b);
}
DFQVIT_INLINE float reduce_min(vec a) {
  return vminvq_f32(a);
}
DFQVIT_INLINE float reduce_max(vec a) {
  return vmaxvq_f32(a);
}
// 2^t for t <= 0; 0 for NaN.
DFQVIT_INLINE vec exp2_nonpositive(vec t) {
  const uint32x4_t normal = vcgeq_f32(t, broadcast(kExp2Least));
  const vec rounded = add(t, broadcast(kRound));
  const vec f = sub(t, sub(rounded, broadcast(kRound)));
  vec p = fma(broadcast(kExp2[4]), f, broadcast(kExp2[3]));
  p = fma(p, f, broadcast(kExp2[2]));
  p = fma(p, f, broadcast(kExp2[1]));
  p = fma(p, f, broadcast(kExp2[0]));
  p = fma(p, f, broadcast(1.0f));
  const uint32x4_t power = vshlq_n_u32(vreinterpretq_u32_f32(rounded), 23);  // into the exponent of p
  return vreinterpretq_f32_u32(vandq_u32(vaddq_u32(vreinterpretq_u32_f32(p), power), normal));
}

#undef DFQVIT_INLINE
}  // namespace neon
}  // namespace simd
}  // namespace dfqvit
