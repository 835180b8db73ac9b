// More of dfqvit/simd.h, for kernels whose vectors of floats become bytes: a coarse exponential, runs of bytes, their
// sums, and bytes put in the order of a blocked weight. No torch headers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dfqvit/simd.h"

namespace dfqvit {
namespace simd {

// 2^f on [0, 1], relative error 2.6e-6: for results that are rounded to bytes.
constexpr float kCoarseExp2[5] = {0x1.00002cp+0f, 0x1.62d166p-1f, 0x1.ee798ap-3f, 0x1.aa13f2p-5f, 0x1.bb7cd4p-7f};

#if DFQVIT_X86
namespace avx512 {

#define DFQVIT_INLINE DFQVIT_TARGET_AVX512 inline __attribute__((always_inline))
// 2^t for t <= 8 as kCoarseExp2 gives it, and 2^-64 below -64: a denormal would cost a hundred cycles.
DFQVIT_INLINE vec exp2_coarse(vec t) {
  t = max(t, _mm512_set1_ps(-64.0f));
  const vec f = _mm512_maskz_reduce_ps(kAll, t, _MM_FROUND_TO_NEG_INF);  // t - floor(t)
  vec p = fma(_mm512_set1_ps(kCoarseExp2[4]), f, _mm512_set1_ps(kCoarseExp2[3]));
  p = fma(p, f, _mm512_set1_ps(kCoarseExp2[2]));
  p = fma(p, f, _mm512_set1_ps(kCoarseExp2[1]));
  p = fma(p, f, _mm512_set1_ps(kCoarseExp2[0]));
  return _mm512_maskz_scalef_ps(kAll, p, t);
}
// n vectors, each value rounded to a byte, one after the other; the values lie in [0, 255].
template <int n>
DFQVIT_INLINE void store_bytes(uint8_t* p, const vec* a) {
  static_assert(n == 1 || n == 4, "");
  __m512i q[n];
  for (int i = 0; i < n; ++i) q[i] = _mm512_maskz_cvtps_epi32(kAll, a[i]);
  if constexpr (n == 1) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(kAll, q[0]));
  } else {  // the packs work within 128 bits, so 4 bytes of each vector stand together in each of them
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i packed = _mm512_packus_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    _mm512_storeu_si512(p, _mm512_maskz_permutexvar_epi32(kAll, order, packed));
  }
}
// The sum of p[i] * ones[i] over 64 * chunks bytes; each of `ones` is 0 or 1.
DFQVIT_INLINE int32_t sum_bytes(const uint8_t* p, const int8_t* ones, int64_t chunks) {
  __m512i total = _mm512_setzero_si512();
  for (int64_t c = 0; c < chunks; ++c) {
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_loadu_si512(p + 64 * c), _mm512_loadu_si512(ones + 64 * c));
    total = _mm512_add_epi32(total, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
  const __m256i half =
      _mm256_add_epi32(_mm512_maskz_extracti64x4_epi64(0xF, total, 0), _mm512_maskz_extracti64x4_epi64(0xF, total, 1));
  __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  quarter = _mm_add_epi32(quarter, _mm_unpackhi_epi64(quarter, quarter));
  return _mm_cvtsi128_si32(quarter) + _mm_extract_epi32(quarter, 1);
}
// 4 x 4 of 128 bits each.
DFQVIT_INLINE void transpose_quarters(__m512i* a) {
  const __m512i b0 = _mm512_maskz_shuffle_i32x4(kAll, a[0], a[1], 0x44);
  const __m512i b1 = _mm512_maskz_shuffle_i32x4(kAll, a[0], a[1], 0xEE);
  const __m512i b2 = _mm512_maskz_shuffle_i32x4(kAll, a[2], a[3], 0x44);
  const __m512i b3 = _mm512_maskz_shuffle_i32x4(kAll, a[2], a[3], 0xEE);
  a[0] = _mm512_maskz_shuffle_i32x4(kAll, b0, b2, 0x88);
  a[1] = _mm512_maskz_shuffle_i32x4(kAll, b0, b2, 0xDD);
  a[2] = _mm512_maskz_shuffle_i32x4(kAll, b1, b3, 0x88);
  a[3] = _mm512_maskz_shuffle_i32x4(kAll, b1, b3, 0xDD);
}
// `count` bytes, 0 beyond, their highest bits flipped: x - 128 as a signed byte.
DFQVIT_INLINE __m512i load_signed(const uint8_t* p, int64_t count) {
  const __mmask64 mask = count >= 64 ? ~0ull : (1ull << count) - 1;
  return _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, p), _mm512_maskz_set1_epi8(mask, -128));
}
// One chunk of a block (kernels/quant_linear/blocked.py): `count` values of each of 16 outputs, as signed bytes. Adds
// to sums[output].
DFQVIT_INLINE void pack_outputs(const uint8_t* const* rows, int64_t count, uint8_t* to, int32_t* sums) {
  __m512i total = _mm512_loadu_si512(sums);
  __m512i v[16];
  for (int i = 0; i < 16; ++i) v[i] = load_signed(rows[i], count);
  for (int i = 0; i < 16; i += 4) {  // words of 32 bits, transposed 4 x 4 within each 128 bits
    const __m512i low0 = _mm512_maskz_unpacklo_epi32(kAll, v[i], v[i + 1]);
    const __m512i high0 = _mm512_maskz_unpackhi_epi32(kAll, v[i], v[i + 1]);
    const __m512i low1 = _mm512_maskz_unpacklo_epi32(kAll, v[i + 2], v[i + 3]);
    const __m512i high1 = _mm512_maskz_unpackhi_epi32(kAll, v[i + 2], v[i + 3]);
    v[i] = _mm512_maskz_unpacklo_epi64(0xFF, low0, low1);
    v[i + 1] = _mm512_maskz_unpackhi_epi64(0xFF, low0, low1);
    v[i + 2] = _mm512_maskz_unpacklo_epi64(0xFF, high0, high1);
    v[i + 3] = _mm512_maskz_unpackhi_epi64(0xFF, high0, high1);
  }
  for (int k = 0; k < 4; ++k) {
    __m512i words[4] = {v[k], v[k + 4], v[k + 8], v[k + 12]};
    transpose_quarters(words);
    for (int quarter = 0; quarter < 4; ++quarter) {
      const __m512i pairs = _mm512_maddubs_epi16(_mm512_set1_epi8(1), words[quarter]);
      total = _mm512_add_epi32(total, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
      _mm512_storeu_si512(to + 64 * (4 * quarter + k), words[quarter]);
    }
  }
  _mm512_storeu_si512(sums, total);
}
// Four values of each of `count` outputs, up to 64, as signed bytes: vector j of the four at to + j * stride belongs to
// the outputs 16 j to 16 j + 15. Only those that hold an output are written.
DFQVIT_INLINE void pack_depths(const uint8_t* const* rows, int64_t count, uint8_t* to, int64_t stride) {
  __m512i v[4];
  for (int i = 0; i < 4; ++i) v[i] = load_signed(rows[i], count);
  const __m512i low0 = _mm512_unpacklo_epi8(v[0], v[1]), high0 = _mm512_unpackhi_epi8(v[0], v[1]);
  const __m512i low1 = _mm512_unpacklo_epi8(v[2], v[3]), high1 = _mm512_unpackhi_epi8(v[2], v[3]);
  __m512i words[4] = {_mm512_unpacklo_epi16(low0, low1), _mm512_unpackhi_epi16(low0, low1),
                      _mm512_unpacklo_epi16(high0, high1), _mm512_unpackhi_epi16(high0, high1)};
  transpose_quarters(words);
  for (int j = 0; 16 * j < count && j < 4; ++j) _mm512_storeu_si512(to + j * stride, words[j]);
}
#undef DFQVIT_INLINE
}  // namespace avx512
#endif

namespace portable {

// What follows serves avx2 too, where the compiler makes of it what it can.
#define DFQVIT_INLINE inline __attribute__((always_inline))
DFQVIT_INLINE vec exp2_coarse(vec t) {
  vec r;
  for (int l = 0; l < kLanes; ++l) {
    const float u = t.v[l] > -64.0f ? t.v[l] : -64.0f;
    const float whole = std::floor(u), f = u - whole;
    float p = kCoarseExp2[4] * f + kCoarseExp2[3];
    p = p * f + kCoarseExp2[2];
    p = p * f + kCoarseExp2[1];
    p = p * f + kCoarseExp2[0];
    const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    r.v[l] = p * power;
  }
  return r;
}
template <int n>
DFQVIT_INLINE void store_bytes(uint8_t* p, const vec* a) {
  for (int i = 0; i < n; ++i) {
    for (int l = 0; l < kLanes; ++l) p[i * kLanes + l] = static_cast<uint8_t>(std::nearbyintf(a[i].v[l]));
  }
}
DFQVIT_INLINE int32_t sum_bytes(const uint8_t* p, const int8_t* ones, int64_t chunks) {
  int32_t total = 0;
  for (int64_t i = 0; i < 64 * chunks; ++i) total += p[i] * ones[i];
  return total;
}
DFQVIT_INLINE void pack_outputs(const uint8_t* const* rows, int64_t count, uint8_t* to, int32_t* sums) {
  for (int n = 0; n < 16; ++n) {
    for (int64_t k = 0; k < 64; ++k) {
      const uint8_t q = k < count ? rows[n][k] ^ 0x80 : 0;
      to[k / 4 * 64 + n * 4 + k % 4] = q;
      sums[n] += static_cast<int8_t>(q);
    }
  }
}
DFQVIT_INLINE void pack_depths(const uint8_t* const* rows, int64_t count, uint8_t* to, int64_t stride) {
  for (int64_t first = 0; first < count; first += 16, to += stride) {
    const int64_t valid = count - first < 16 ? count - first : 16;
    for (int64_t n = 0; n < 16; ++n) {
      for (int i = 0; i < 4; ++i) to[4 * n + i] = n < valid ? rows[i][first + n] ^ 0x80 : 0;
    }
  }
}
#undef DFQVIT_INLINE
}  // namespace portable

#if DFQVIT_X86
namespace avx2 {

#define DFQVIT_INLINE DFQVIT_TARGET_AVX2 inline __attribute__((always_inline))
using portable::pack_depths;
using portable::pack_outputs;
using portable::sum_bytes;
DFQVIT_INLINE vec exp2_coarse(vec t) {
  const vec u = _mm256_max_ps(t, _mm256_set1_ps(-64.0f)), whole = _mm256_floor_ps(u), f = _mm256_sub_ps(u, whole);
  vec p = fma(_mm256_set1_ps(kCoarseExp2[4]), f, _mm256_set1_ps(kCoarseExp2[3]));
  p = fma(p, f, _mm256_set1_ps(kCoarseExp2[2]));
  p = fma(p, f, _mm256_set1_ps(kCoarseExp2[1]));
  p = fma(p, f, _mm256_set1_ps(kCoarseExp2[0]));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);  // into the exponent of p
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
}
template <int n>
DFQVIT_INLINE void store_bytes(uint8_t* p, const vec* a) {
  for (int i = 0; i < n; ++i) {
    const __m256i q = _mm256_cvtps_epi32(a[i]);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p + i * kLanes), _mm_packus_epi16(words, words));
  }
}
#undef DFQVIT_INLINE
}  // namespace avx2
#endif

}  // namespace simd
}  // namespace dfqvit

#if DFQVIT_ARM
#include "dfqvit/simd_neon_bytes.h"
#endif
