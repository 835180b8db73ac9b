// A vector of floats for each CPU path, with the few operations that float kernels need. No torch headers.
//
// One namespace a path (simd::avx512, simd::avx2, simd::neon, simd::portable), the same names in each, so that a kernel
// is written once and compiled for each path: it includes its body with DFQVIT_PATH and DFQVIT_TARGET set (see
// patch_similarity_entropy_body.h). Multiply-adds are fused where the instruction set can.
#pragma once

#include <cstdint>
#include <cstring>

#include "dfqvit/isa.h"

#if DFQVIT_X86
#include <immintrin.h>
#endif

namespace dfqvit {
namespace simd {

// 2^f on [-1/2, 1/2] = 1 + f (c0 + f (c1 + ...)): relative error 9.2e-8, 1.4 units in the last place with rounding.
constexpr float kExp2[5] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba14p-10f};
// Below this power of two the result is a denormal, and is given as 0.
constexpr float kExp2Least = -126.0f;
// 1.5 * 2^23: t + kRound has the nearest integer to t in its low bits, for |t| < 2^22.
constexpr float kRound = 12582912.0f;

#if DFQVIT_X86
namespace avx512 {

#define DFQVIT_INLINE DFQVIT_TARGET_AVX512 inline __attribute__((always_inline))
using vec = __m512;
constexpr int kLanes = 16;
constexpr int kVectors = 4;  // of a register tile

DFQVIT_INLINE vec load(const float* p) {
  return _mm512_loadu_ps(p);
}
DFQVIT_INLINE void store(float* p, vec a) {
  _mm512_storeu_ps(p, a);
}
DFQVIT_INLINE vec broadcast(float a) {
  return _mm512_set1_ps(a);
}
DFQVIT_INLINE vec add(vec a, vec b) {
  return _mm512_add_ps(a, b);
}
DFQVIT_INLINE vec sub(vec a, vec b) {
  return _mm512_sub_ps(a, b);
}
DFQVIT_INLINE vec mul(vec a, vec b) {
  return _mm512_mul_ps(a, b);
}
DFQVIT_INLINE vec fma(vec a, vec b, vec c) {  // a b + c
  return _mm512_fmadd_ps(a, b, c);
}
// The zero-masked forms with all lanes on are the plain instructions, without GCC 12's false warnings (its bug 105593).
constexpr __mmask16 kAll = 0xFFFF;
DFQVIT_INLINE vec min(vec a, vec b) {  // b where either is NaN
  return _mm512_maskz_min_ps(kAll, a, b);
}
DFQVIT_INLINE vec max(vec a, vec b) {  // b where either is NaN
  return _mm512_maskz_max_ps(kAll, a, b);
}
DFQVIT_INLINE float reduce_min(vec a) {
  const __m256 h = _mm256_min_ps(_mm512_maskz_extractf32x8_ps(0xFF, a, 0), _mm512_maskz_extractf32x8_ps(0xFF, a, 1));
  __m128 m = _mm_min_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  m = _mm_min_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}
DFQVIT_INLINE float reduce_max(vec a) {
  const __m256 h = _mm256_max_ps(_mm512_maskz_extractf32x8_ps(0xFF, a, 0), _mm512_maskz_extractf32x8_ps(0xFF, a, 1));
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
// 2^t for t <= 0; 0 for NaN.
DFQVIT_INLINE vec exp2_nonpositive(vec t) {
  const __mmask16 normal = _mm512_cmp_ps_mask(t, _mm512_set1_ps(kExp2Least), _CMP_GE_OQ);
  const vec rounded = _mm512_add_ps(t, _mm512_set1_ps(kRound));
  const vec f = _mm512_sub_ps(t, _mm512_sub_ps(rounded, _mm512_set1_ps(kRound)));
  vec p = fma(_mm512_set1_ps(kExp2[4]), f, _mm512_set1_ps(kExp2[3]));
  p = fma(p, f, _mm512_set1_ps(kExp2[2]));
  p = fma(p, f, _mm512_set1_ps(kExp2[1]));
  p = fma(p, f, _mm512_set1_ps(kExp2[0]));
  p = fma(p, f, _mm512_set1_ps(1.0f));
  const __m512i power = _mm512_maskz_slli_epi32(kAll, _mm512_castps_si512(rounded), 23);  // into the exponent of p
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(normal, _mm512_castps_si512(p), power));
}

#undef DFQVIT_INLINE
}  // namespace avx512

namespace avx2 {

#define DFQVIT_INLINE DFQVIT_TARGET_AVX2 inline __attribute__((always_inline))
using vec = __m256;
constexpr int kLanes = 8;
constexpr int kVectors = 2;

DFQVIT_INLINE vec load(const float* p) {
  return _mm256_loadu_ps(p);
}
DFQVIT_INLINE void store(float* p, vec a) {
  _mm256_storeu_ps(p, a);
}
DFQVIT_INLINE vec broadcast(float a) {
  return _mm256_set1_ps(a);
}
DFQVIT_INLINE vec add(vec a, vec b) {
  return _mm256_add_ps(a, b);
}
DFQVIT_INLINE vec sub(vec a, vec b) {
  return _mm256_sub_ps(a, b);
}
DFQVIT_INLINE vec mul(vec a, vec b) {
  return _mm256_mul_ps(a, b);
}
DFQVIT_INLINE vec fma(vec a, vec b, vec c) {  // a b + c
  return _mm256_fmadd_ps(a, b, c);
}
DFQVIT_INLINE vec min(vec a, vec b) {  // b where either is NaN
  return _mm256_min_ps(a, b);
}
DFQVIT_INLINE vec max(vec a, vec b) {  // b where either is NaN
  return _mm256_max_ps(a, b);
}
DFQVIT_INLINE float reduce_min(vec a) {
  __m128 m = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_min_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}
DFQVIT_INLINE float reduce_max(vec a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
// 2^t for t <= 0; 0 for NaN.
DFQVIT_INLINE vec exp2_nonpositive(vec t) {
  const vec normal = _mm256_cmp_ps(t, _mm256_set1_ps(kExp2Least), _CMP_GE_OQ);
  const vec rounded = _mm256_add_ps(t, _mm256_set1_ps(kRound));
  const vec f = _mm256_sub_ps(t, _mm256_sub_ps(rounded, _mm256_set1_ps(kRound)));
  vec p = fma(_mm256_set1_ps(kExp2[4]), f, _mm256_set1_ps(kExp2[3]));
  p = fma(p, f, _mm256_set1_ps(kExp2[2]));
  p = fma(p, f, _mm256_set1_ps(kExp2[1]));
  p = fma(p, f, _mm256_set1_ps(kExp2[0]));
  p = fma(p, f, _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(rounded), 23);  // into the exponent of p
  return _mm256_and_ps(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power)), normal);
}

#undef DFQVIT_INLINE
}  // namespace avx2
#endif  // DFQVIT_X86

namespace portable {

#define DFQVIT_INLINE inline __attribute__((always_inline))
constexpr int kLanes = 4;
constexpr int kVectors = 2;

struct vec {
  float v[kLanes];
};

// clang-format off
#define DFQVIT_EACH_LANE(expression)                      \
  vec r;                                                  \
  for (int l = 0; l < kLanes; ++l) r.v[l] = (expression); \
  return r;
DFQVIT_INLINE vec load(const float* p) { DFQVIT_EACH_LANE(p[l]) }
DFQVIT_INLINE void store(float* p, vec a) { std::memcpy(p, a.v, sizeof(a.v)); }
DFQVIT_INLINE vec broadcast(float a) { DFQVIT_EACH_LANE(a) }
DFQVIT_INLINE vec add(vec a, vec b) { DFQVIT_EACH_LANE(a.v[l] + b.v[l]) }
DFQVIT_INLINE vec sub(vec a, vec b) { DFQVIT_EACH_LANE(a.v[l] - b.v[l]) }
DFQVIT_INLINE vec mul(vec a, vec b) { DFQVIT_EACH_LANE(a.v[l] * b.v[l]) }
DFQVIT_INLINE vec fma(vec a, vec b, vec c) { DFQVIT_EACH_LANE(a.v[l] * b.v[l] + c.v[l]) }  // rounded twice
DFQVIT_INLINE vec min(vec a, vec b) { DFQVIT_EACH_LANE(a.v[l] < b.v[l] ? a.v[l] : b.v[l]) }  // b where either is NaN
DFQVIT_INLINE vec max(vec a, vec b) { DFQVIT_EACH_LANE(a.v[l] > b.v[l] ? a.v[l] : b.v[l]) }  // b where either is NaN
#undef DFQVIT_EACH_LANE
// clang-format on
DFQVIT_INLINE float reduce_min(vec a) {
  float r = a.v[0];
  for (int l = 1; l < kLanes; ++l) r = a.v[l] < r ? a.v[l] : r;
  return r;
}
DFQVIT_INLINE float reduce_max(vec a) {
  float r = a.v[0];
  for (int l = 1; l < kLanes; ++l) r = a.v[l] > r ? a.v[l] : r;
  return r;
}
// 2^t for t <= 0; 0 for NaN.
DFQVIT_INLINE vec exp2_nonpositive(vec t) {
  vec r;
  for (int l = 0; l < kLanes; ++l) {
    const float u = t.v[l] >= kExp2Least ? t.v[l] : kExp2Least;
    const int32_t n = static_cast<int32_t>(u - 0.5f);  // u <= 0, so truncation rounds to nearest
    const float f = u - static_cast<float>(n);
    float p = kExp2[4] * f + kExp2[3];
    p = p * f + kExp2[2];
    p = p * f + kExp2[1];
    p = p * f + kExp2[0];
    p = p * f + 1.0f;
    const int32_t bits = (n + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    r.v[l] = t.v[l] >= kExp2Least ? p * power : 0.0f;
  }
  return r;
}

#undef DFQVIT_INLINE
}  // namespace portable

}  // namespace simd
}  // namespace dfqvit

#if DFQVIT_ARM
#include "dfqvit/simd_neon.h"
#endif
