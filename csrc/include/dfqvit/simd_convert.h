// More of dfqvit/simd.h: bfloat16, float16, int32 and bytes to and from vectors of floats, exact quotients. No torch
// headers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dfqvit/simd.h"

namespace dfqvit {
namespace simd {

struct bfloat {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

// The least and the greatest divisor for which `exact_quotients` neither overflows nor underflows in between.
constexpr float kLeastDivisor = 0x1p-100f, kGreatestDivisor = 0x1p100f;

#if DFQVIT_X86
namespace avx512 {

#define DFQVIT_INLINE DFQVIT_TARGET_AVX512 inline __attribute__((always_inline))
DFQVIT_INLINE vec load(const bfloat* p) {
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAll, wide, 16));
}
DFQVIT_INLINE vec load(const half* p) {
  return _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
DFQVIT_INLINE void store(bfloat* p, vec a) {  // half to even; NaN stays NaN
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(kAll, bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 number = _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7FC00000), number, up);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtepi32_epi16(kAll, _mm512_maskz_srli_epi32(kAll, kept, 16)));
}
DFQVIT_INLINE void store(half* p, vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(kAll, a, _MM_FROUND_TO_NEAREST_INT));
}
DFQVIT_INLINE vec from_integers(const int32_t* p) {
  return _mm512_maskz_cvtepi32_ps(kAll, _mm512_loadu_si512(p));
}
DFQVIT_INLINE vec zero_below(vec value, vec a, vec limit) {  // value, or 0 where a < limit
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, limit, _CMP_NLT_UQ), value);
}
DFQVIT_INLINE vec divide(vec a, vec b) {
  return _mm512_div_ps(a, b);
}
DFQVIT_INLINE vec fnma(vec a, vec b, vec c) {  // c - a b
  return _mm512_fnmadd_ps(a, b, c);
}
// clamp(round(a[i]) + zero, 0, greatest) as bytes at places[i]; a[i] < 2^30, zero and greatest whole, in [0, 255]; one
// zero for every `columns` vectors. kTogether: all at places[0], one after the other.
template <int n, int columns, bool kTogether>
DFQVIT_INLINE void store_integers(uint8_t* const* places, const vec* a, const vec* zero, vec greatest) {
  static_assert(n == 1 || (n == 4 && columns == 1), "");
  __m512i q[n];
  for (int i = 0; i < n; ++i) q[i] = _mm512_maskz_cvtps_epi32(kAll, a[i]);
  const __m512i offset = _mm512_maskz_cvtps_epi32(kAll, zero[0]), most = _mm512_maskz_cvtps_epi32(kAll, greatest);
  if constexpr (n == 1) {
    q[0] = _mm512_maskz_max_epi32(kAll, _mm512_add_epi32(q[0], offset), _mm512_setzero_si512());
    q[0] = _mm512_maskz_min_epi32(kAll, q[0], most);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(places[0]), _mm512_maskz_cvtepi32_epi8(kAll, q[0]));
  } else {  // the packs saturate, and work within 128 bits: 4 bytes of each vector come to stand together in each of
            // them
    const __m512i offsets = _mm512_packs_epi32(offset, offset), mosts = _mm512_packs_epi32(most, most);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(q[0], q[1]), offsets);
    const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32(q[2], q[3]), offsets);
    __m512i bytes = _mm512_min_epu8(_mm512_packus_epi16(low, high), _mm512_packus_epi16(mosts, mosts));
    bytes = _mm512_maskz_permutexvar_epi32(kAll, order, bytes);
    if constexpr (kTogether) {
      _mm512_storeu_si512(places[0], bytes);
    } else {
      const vec rows = _mm512_castsi512_ps(bytes);
      _mm_storeu_ps(reinterpret_cast<float*>(places[0]), _mm512_maskz_extractf32x4_ps(0xF, rows, 0));
      _mm_storeu_ps(reinterpret_cast<float*>(places[1]), _mm512_maskz_extractf32x4_ps(0xF, rows, 1));
      _mm_storeu_ps(reinterpret_cast<float*>(places[2]), _mm512_maskz_extractf32x4_ps(0xF, rows, 2));
      _mm_storeu_ps(reinterpret_cast<float*>(places[3]), _mm512_maskz_extractf32x4_ps(0xF, rows, 3));
    }
  }
}
DFQVIT_INLINE bool any_nan(vec a) {
  return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0;
}
// a[i] / b, correctly rounded, into a[i], for finite a with |a / b| < 2^24 and b between kLeastDivisor and
// kGreatestDivisor, given 1 / b correctly rounded. Five multiply-adds, a fraction of a division's time. The first
// two corrections bring the quotient within one unit of the last place; from there one more gives the rounded quotient
// exactly (Markstein, IBM J. Res. Dev. 34, 1990; Muller et al., Handbook of Floating-Point Arithmetic, section 4.7).
// One b and inverse for every `columns` vectors.
template <int n, int columns>
DFQVIT_INLINE void exact_quotients(vec* a, const vec* b, const vec* inverse) {
  vec q[n];
  for (int i = 0; i < n; ++i) q[i] = mul(a[i], inverse[i % columns]);
  for (int i = 0; i < n; ++i) q[i] = fma(fnma(b[i % columns], q[i], a[i]), inverse[i % columns], q[i]);
  for (int i = 0; i < n; ++i) a[i] = fma(fnma(b[i % columns], q[i], a[i]), inverse[i % columns], q[i]);
}
// Whether the products a[i] * inverse may be rounded to integers in place of the quotients by b: they then differ by
// less than 2^-13 where they are below 512, so that only near the middle between two integers it matters. Almost
// always.
template <int n, int columns>
DFQVIT_INLINE bool round_alike(vec* a, const vec* inverse) {
  vec q[n], far = _mm512_setzero_ps();
  for (int i = 0; i < n; ++i) q[i] = mul(a[i], inverse[i % columns]);
  for (int i = 0; i < n; ++i) {  // the greatest distance from an integer
    far = _mm512_maskz_range_ps(kAll, far, _mm512_maskz_reduce_ps(kAll, q[i], _MM_FROUND_TO_NEAREST_INT), 11);
  }
  if (__builtin_expect(_mm512_cmp_ps_mask(far, _mm512_set1_ps(0.5f - 0x1p-12f), _CMP_GT_OQ) != 0, 0)) return false;
  for (int i = 0; i < n; ++i) a[i] = min(q[i], _mm512_set1_ps(0x1p20f));
  return true;
}
// A store past the caches, to an address that is a multiple of the vector's size, and the end of a run of them.
DFQVIT_INLINE void stream(float* p, vec a) {
  _mm512_stream_ps(p, a);
}
DFQVIT_INLINE void finish_stream() {
  _mm_sfence();
}
#undef DFQVIT_INLINE
}  // namespace avx512

namespace avx2 {

#define DFQVIT_INLINE DFQVIT_TARGET_AVX2 inline __attribute__((always_inline))
DFQVIT_INLINE vec load(const bfloat* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
DFQVIT_INLINE vec load(const half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
DFQVIT_INLINE void store(bfloat* p, vec a) {  // half to even; NaN stays NaN
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_ORD_Q));
  const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(_mm256_set1_epi32(0x7FC00000), up, number), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1)));
}
DFQVIT_INLINE void store(half* p, vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
DFQVIT_INLINE vec from_integers(const int32_t* p) {
  return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
DFQVIT_INLINE vec zero_below(vec value, vec a, vec limit) {  // value, or 0 where a < limit
  return _mm256_and_ps(value, _mm256_cmp_ps(a, limit, _CMP_NLT_UQ));
}
DFQVIT_INLINE vec divide(vec a, vec b) {
  return _mm256_div_ps(a, b);
}
DFQVIT_INLINE vec fnma(vec a, vec b, vec c) {  // c - a b
  return _mm256_fnmadd_ps(a, b, c);
}
template <int n, int columns, bool kTogether>
DFQVIT_INLINE void store_integers(uint8_t* const* places, const vec* a, const vec* zero, vec greatest) {
  for (int i = 0; i < n; ++i) {
    __m256i q = _mm256_add_epi32(_mm256_cvtps_epi32(a[i]), _mm256_cvtps_epi32(zero[i % columns]));
    q = _mm256_max_epi32(q, _mm256_setzero_si256());
    q = _mm256_min_epi32(q, _mm256_cvtps_epi32(greatest));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    uint8_t* p = kTogether ? places[0] + i * kLanes : places[i];
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
}
template <int n, int columns>
DFQVIT_INLINE bool round_alike(vec*, const vec*) {
  return false;
}
DFQVIT_INLINE bool any_nan(vec a) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0;
}
template <int n, int columns>
DFQVIT_INLINE void exact_quotients(vec* a, const vec* b, const vec* inverse) {
  vec q[n];
  for (int i = 0; i < n; ++i) q[i] = mul(a[i], inverse[i % columns]);
  for (int i = 0; i < n; ++i) q[i] = fma(fnma(b[i % columns], q[i], a[i]), inverse[i % columns], q[i]);
  for (int i = 0; i < n; ++i) a[i] = fma(fnma(b[i % columns], q[i], a[i]), inverse[i % columns], q[i]);
}
DFQVIT_INLINE void stream(float* p, vec a) {
  _mm256_stream_ps(p, a);
}
DFQVIT_INLINE void finish_stream() {
  _mm_sfence();
}
#undef DFQVIT_INLINE
}  // namespace avx2

#endif  // DFQVIT_X86

namespace portable {

#define DFQVIT_INLINE inline __attribute__((always_inline))
DFQVIT_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
DFQVIT_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
DFQVIT_INLINE float from_half(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, fraction = h & 1023u;
  if (exponent == 31) return bits_to_float(sign | 0x7F800000u | fraction << 13);
  if (exponent == 0) return bits_to_float(sign | float_to_bits(static_cast<float>(fraction) * 0x1p-24f));
  return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
}
DFQVIT_INLINE uint16_t to_half(float value) {  // half to even
  const uint32_t sign = float_to_bits(value) >> 16 & 0x8000u, magnitude = float_to_bits(value) & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {  // denormal: the sum has the rounded multiple of 2^-24 in its low bits
    return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude + 0xFFFu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13));
}

// clang-format off
#define DFQVIT_EACH_LANE(expression)                      \
  vec r;                                                  \
  for (int l = 0; l < kLanes; ++l) r.v[l] = (expression); \
  return r;
DFQVIT_INLINE vec load(const bfloat* p) { DFQVIT_EACH_LANE(bits_to_float(static_cast<uint32_t>(p[l].bits) << 16)) }
DFQVIT_INLINE vec load(const half* p) { DFQVIT_EACH_LANE(from_half(p[l].bits)) }
DFQVIT_INLINE vec from_integers(const int32_t* p) { DFQVIT_EACH_LANE(static_cast<float>(p[l])) }
DFQVIT_INLINE vec zero_below(vec value, vec a, vec limit) { DFQVIT_EACH_LANE(a.v[l] < limit.v[l] ? 0.0f : value.v[l]) }
DFQVIT_INLINE vec divide(vec a, vec b) { DFQVIT_EACH_LANE(a.v[l] / b.v[l]) }
#undef DFQVIT_EACH_LANE
// clang-format on
DFQVIT_INLINE void store(bfloat* p, vec a) {
  for (int l = 0; l < kLanes; ++l) {
    const uint32_t bits = float_to_bits(a.v[l]);
    p[l].bits = static_cast<uint16_t>(a.v[l] != a.v[l] ? 0x7FC0u : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
  }
}
DFQVIT_INLINE void store(half* p, vec a) {
  for (int l = 0; l < kLanes; ++l) p[l].bits = to_half(a.v[l]);
}
template <int n, int columns, bool kTogether>
DFQVIT_INLINE void store_integers(uint8_t* const* places, const vec* a, const vec* zero, vec greatest) {
  for (int i = 0; i < n; ++i) {
    uint8_t* p = kTogether ? places[0] + i * kLanes : places[i];
    for (int l = 0; l < kLanes; ++l) {
      float q = std::nearbyintf(a[i].v[l]) + zero[i % columns].v[l];
      q = q < 0.0f ? 0.0f : q > greatest.v[l] ? greatest.v[l] : q;
      p[l] = static_cast<uint8_t>(q);
    }
  }
}
template <int n, int columns>
DFQVIT_INLINE bool round_alike(vec*, const vec*) {
  return false;
}
DFQVIT_INLINE bool any_nan(vec a) {
  bool any = false;
  for (int l = 0; l < kLanes; ++l) any |= a.v[l] != a.v[l];
  return any;
}
template <int n, int columns>
DFQVIT_INLINE void exact_quotients(vec* a, const vec* b, const vec*) {
  for (int i = 0; i < n; ++i) a[i] = divide(a[i], b[i % columns]);
}
DFQVIT_INLINE void stream(float* p, vec a) {
  store(p, a);
}
DFQVIT_INLINE void finish_stream() {}
#undef DFQVIT_INLINE
}  // namespace portable

}  // namespace simd
}  // namespace dfqvit

#if DFQVIT_ARM
#include "dfqvit/simd_neon_convert.h"
#endif
