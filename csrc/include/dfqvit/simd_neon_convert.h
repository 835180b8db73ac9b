// The part of dfqvit/simd_convert.h for 64-bit ARM, which includes it. The conversions of half precision are a part of
// every such processor; bfloat16 is rounded by integers, as on x86, so that FEAT_BF16 is not needed. No torch headers.
#pragma once

namespace dfqvit {
namespace simd {
namespace neon {

#define DFQVIT_INLINE inline __attribute__((always_inline))
DFQVIT_INLINE vec load(const bfloat* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16));
}
DFQVIT_INLINE vec load(const half* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
}
DFQVIT_INLINE void store(bfloat* p, vec a) {  // half to even; NaN stays NaN
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
  const uint32x4_t kept = vbslq_u32(vceqq_f32(a, a), up, vdupq_n_u32(0x7FC00000));
  vst1_u16(&p->bits, vshrn_n_u32(kept, 16));
}
DFQVIT_INLINE void store(half* p, vec a) {
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(a)));
}
DFQVIT_INLINE vec from_integers(const int32_t* p) {
  return vcvtq_f32_s32(vld1q_s32(p));
}
DFQVIT_INLINE vec zero_below(vec value, vec a, vec limit) {  // value, or 0 where a < limit
  return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value), vcltq_f32(a, limit)));
}
DFQVIT_INLINE vec divide(vec a, vec b) {
  return vdivq_f32(a, b);
}
// 16 integers as bytes in their order; what does not fit is cut.
DFQVIT_INLINE uint8x16_t bytes_of(const int32x4_t* q) {
  const int16x8_t low = vqmovn_high_s32(vqmovn_s32(q[0]), q[1]), high = vqmovn_high_s32(vqmovn_s32(q[2]), q[3]);
  return vqmovun_high_s16(vqmovun_s16(low), high);
}
template <int n, int columns, bool kTogether>
DFQVIT_INLINE void store_integers(uint8_t* const* places, const vec* a, const vec* zero, vec greatest) {
  static_assert(n % 4 == 0, "");
  const uint8x16_t most = vdupq_n_u8(static_cast<uint8_t>(vgetq_lane_f32(greatest, 0)));
  for (int i = 0; i < n; i += 4) {
    int32x4_t q[4];
    for (int v = 0; v < 4; ++v) q[v] = vaddq_s32(vcvtnq_s32_f32(a[i + v]), vcvtnq_s32_f32(zero[(i + v) % columns]));
    const uint8x16_t bytes = vminq_u8(bytes_of(q), most);
    if constexpr (kTogether) {
      vst1q_u8(places[0] + 4 * i, bytes);
    } else {
      uint8_t four[16];
      vst1q_u8(four, bytes);
      for (int v = 0; v < 4; ++v) std::memcpy(places[i + v], four + 4 * v, 4);
    }
  }
}
template <int n, int columns>
DFQVIT_INLINE bool round_alike(vec*, const vec*) {
  return false;
}
DFQVIT_INLINE bool any_nan(vec a) {
  return vminvq_u32(vceqq_f32(a, a)) == 0;
}
// As on x86: five multiply-adds in the time of a fraction of a division.
template <int n, int columns>
DFQVIT_INLINE void exact_quotients(vec* a, const vec* b, const vec* inverse) {
  vec q[n];
  for (int i = 0; i < n; ++i) q[i] = mul(a[i], inverse[i % columns]);
  for (int i = 0; i < n; ++i) q[i] = fma(fnma(b[i % columns], q[i], a[i]), inverse[i % columns], q[i]);
  for (int i = 0; i < n; ++i) a[i] = fma(fnma(b[i % columns], q[i], a[i]), inverse[i % columns], q[i]);
}
DFQVIT_INLINE void stream(float* p, vec a) {
  store(p, a);
}
DFQVIT_INLINE void finish_stream() {}
#undef DFQVIT_INLINE
}  // namespace neon
}  // namespace simd
}  // namespace dfqvit
