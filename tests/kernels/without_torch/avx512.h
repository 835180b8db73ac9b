// AVX-512, its products of bytes and the int8 tiles of AMX for a processor that has AVX2 at most: each instruction
// that csrc/cpu asks for, written out value by value after Intel's manual (Software Developer's Manual, volume 2).
// The compiler puts this before operators.cpp (tests/kernels/test_avx512.py). What the emulated processor has is what
// the environment variable EMULATED names: "avx512", "vnni" or "amx", each with those before it.
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>

#include "dfqvit/isa.h"

#undef DFQVIT_TARGET_AVX512
#undef DFQVIT_TARGET_VNNI
#undef DFQVIT_TARGET_AMX
#define DFQVIT_TARGET_AVX512 DFQVIT_TARGET_AVX2
#define DFQVIT_TARGET_VNNI DFQVIT_TARGET_AVX2
#define DFQVIT_TARGET_AMX DFQVIT_TARGET_AVX2

namespace emulated {

// The processor.

inline int level() {  // 1, 2 or 3: avx512, vnni, amx
  const char* value = std::getenv("EMULATED");
  const std::string name = value ? value : "";
  return name == "amx" ? 3 : name == "vnni" ? 2 : 1;
}
inline int supports(const std::string& feature) {
  return feature != "avx512vnni" || level() >= 2;
}
// Leaf 7: the tiles and their products of bytes where EMULATED names them.
inline int cpuid(unsigned, unsigned, unsigned* eax, unsigned* ebx, unsigned* ecx, unsigned* edx) {
  *eax = *ebx = *ecx = 0;
  *edx = level() >= 3 ? 1u << 24 | 1u << 25 : 0;
  return 1;
}
template <class... Arguments>
long system_call(long number, Arguments... arguments) {
  if (number == SYS_arch_prctl) return 0;  // the permission for tiles
  return ::syscall(number, arguments...);
}

// Vectors as arrays.

template <class T, int n>
struct Lanes {
  T v[n];
};
template <class T, class Vector>
Lanes<T, sizeof(Vector) / sizeof(T)> lanes(Vector a) {
  Lanes<T, sizeof(Vector) / sizeof(T)> result;
  std::memcpy(&result, &a, sizeof(a));
  return result;
}
template <class Vector, class T, int n>
Vector vector(const Lanes<T, n>& a) {
  static_assert(sizeof(Vector) == sizeof(a), "");
  Vector result;
  std::memcpy(&result, &a, sizeof(a));
  return result;
}
// f of each number of a lane, 0 where the mask has no bit: of T, as a Vector.
template <class Vector, class T, class Function>
Vector each(uint64_t mask, Function f) {
  Lanes<T, sizeof(Vector) / sizeof(T)> result;
  for (int i = 0; i < static_cast<int>(sizeof(Vector) / sizeof(T)); ++i) result.v[i] = mask >> i & 1 ? f(i) : T(0);
  return vector<Vector>(result);
}
// The same of each pair of numbers.
template <class T, class Vector, class Function>
Vector pairwise(uint64_t mask, Vector a, Vector b, Function f) {
  const auto x = lanes<T>(a), y = lanes<T>(b);
  return each<Vector, T>(mask, [&](int i) { return f(x.v[i], y.v[i]); });
}
constexpr uint64_t kAll = ~uint64_t{0};
template <class T>
T saturated(int32_t value) {
  return static_cast<T>(std::clamp<int32_t>(value, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}

// Floats.

inline __m512 add(__m512 a, __m512 b) {
  return a + b;
}
inline __m512 sub(__m512 a, __m512 b) {
  return a - b;
}
inline __m512 mul(__m512 a, __m512 b) {
  return a * b;
}
inline __m512 div(__m512 a, __m512 b) {
  return a / b;
}
inline __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  const auto x = lanes<float>(a), y = lanes<float>(b), z = lanes<float>(c);
  return each<__m512, float>(kAll, [&](int i) { return std::fma(x.v[i], y.v[i], z.v[i]); });
}
inline __m512 fnmadd(__m512 a, __m512 b, __m512 c) {
  return fmadd(-a, b, c);
}
inline __m512 set1(float value) {
  return each<__m512, float>(kAll, [&](int) { return value; });
}
inline __m512 load(const float* p) {
  __m512 result;
  std::memcpy(&result, p, sizeof(result));
  return result;
}
inline void store(float* p, __m512 a) {
  std::memcpy(p, &a, sizeof(a));
}
inline void stream(float* p, __m512 a) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) std::abort();
  store(p, a);
}
inline __m512 min(uint64_t mask, __m512 a, __m512 b) {  // the second where one is no number
  return pairwise<float>(mask, a, b, [](float x, float y) { return x < y ? x : y; });
}
inline __m512 max(uint64_t mask, __m512 a, __m512 b) {
  return pairwise<float>(mask, a, b, [](float x, float y) { return x > y ? x : y; });
}
inline __mmask16 compare(__m512 a, __m512 b, int predicate) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  unsigned result = 0;
  for (int i = 0; i < 16; ++i) {
    const bool unordered = std::isunordered(x.v[i], y.v[i]);
    bool found = false;
    switch (predicate) {
      case _CMP_GE_OQ:
        found = x.v[i] >= y.v[i];
        break;
      case _CMP_GT_OQ:
        found = x.v[i] > y.v[i];
        break;
      case _CMP_ORD_Q:
        found = !unordered;
        break;
      case _CMP_UNORD_Q:
        found = unordered;
        break;
      case _CMP_NLT_UQ:
        found = unordered || !(x.v[i] < y.v[i]);
        break;
      default:
        std::abort();
    }
    result |= static_cast<unsigned>(found) << i;
  }
  return static_cast<__mmask16>(result);
}
inline __m512 mov(uint64_t mask, __m512 a) {
  const auto x = lanes<float>(a);
  return each<__m512, float>(mask, [&](int i) { return x.v[i]; });
}
inline __m512 range(uint64_t mask, __m512 a, __m512 b, int what) {
  if (what != 11) std::abort();  // the greater absolute value, without a sign; the number where one is none
  return pairwise<float>(mask, a, b, [](float x, float y) { return std::fmax(std::fabs(x), std::fabs(y)); });
}
// What is left of a number when its whole part is taken, rounded to even or down.
inline __m512 reduce(uint64_t mask, __m512 a, int rounding) {
  if (rounding != _MM_FROUND_TO_NEAREST_INT && rounding != _MM_FROUND_TO_NEG_INF) std::abort();
  const auto x = lanes<float>(a);
  return each<__m512, float>(mask, [&](int i) {
    if (std::isinf(x.v[i])) return 0.0f;
    return x.v[i] - (rounding == _MM_FROUND_TO_NEG_INF ? std::floor(x.v[i]) : std::nearbyint(x.v[i]));
  });
}
inline __m512 scalef(uint64_t mask, __m512 a, __m512 b) {  // a 2^floor(b)
  return pairwise<float>(mask, a, b, [](float x, float y) {
    return std::isnan(y) ? y : std::ldexp(x, static_cast<int>(std::floor(std::clamp(y, -1000.0f, 1000.0f))));
  });
}

// Floats from and to others.

inline __m512i from_shorts(uint64_t mask, __m256i a) {
  const auto x = lanes<uint16_t>(a);
  return each<__m512i, int32_t>(mask, [&](int i) { return static_cast<int32_t>(x.v[i]); });
}
inline __m512 from_halves(uint64_t mask, __m256i a) {
  const auto x = lanes<uint16_t>(a);
  return each<__m512, float>(mask, [&](int i) { return _cvtsh_ss(x.v[i]); });
}
inline __m256i to_halves(uint64_t mask, __m512 a, int rounding) {
  if (rounding != _MM_FROUND_TO_NEAREST_INT) std::abort();
  const auto x = lanes<float>(a);
  return each<__m256i, uint16_t>(mask, [&](int i) { return _cvtss_sh(x.v[i], _MM_FROUND_TO_NEAREST_INT); });
}
inline __m512i to_integers(uint64_t mask, __m512 a) {  // to even; the least where there is none
  const auto x = lanes<float>(a);
  return each<__m512i, int32_t>(mask, [&](int i) { return _mm_cvtss_si32(_mm_set_ss(x.v[i])); });
}
inline __m512 from_integers(uint64_t mask, __m512i a) {
  const auto x = lanes<int32_t>(a);
  return each<__m512, float>(mask, [&](int i) { return static_cast<float>(x.v[i]); });
}

// Integers.

inline __m512i load_integers(const void* p) {
  __m512i result;
  std::memcpy(&result, p, sizeof(result));
  return result;
}
inline void store_integers(void* p, __m512i a) {
  std::memcpy(p, &a, sizeof(a));
}
inline __m512i load_bytes(uint64_t mask, const void* p) {  // reads only what the mask names
  return each<__m512i, uint8_t>(mask, [&](int i) { return static_cast<const uint8_t*>(p)[i]; });
}
template <class T>
__m512i set(uint64_t mask, int value) {
  return each<__m512i, T>(mask, [&](int) { return static_cast<T>(value); });
}
template <class... Values>
__m512i set_each(Values... values) {
  return vector<__m512i>(Lanes<int32_t, sizeof...(values)>{{values...}});
}
inline __m512i add_integers(uint64_t mask, __m512i a, __m512i b) {
  return pairwise<uint32_t>(mask, a, b, [](uint32_t x, uint32_t y) { return x + y; });
}
inline __m512i add_saturating(__m512i a, __m512i b) {
  return pairwise<int16_t>(kAll, a, b, [](int16_t x, int16_t y) { return saturated<int16_t>(x + y); });
}
inline __m512i min_integers(uint64_t mask, __m512i a, __m512i b) {
  return pairwise<int32_t>(mask, a, b, [](int32_t x, int32_t y) { return std::min(x, y); });
}
inline __m512i max_integers(uint64_t mask, __m512i a, __m512i b) {
  return pairwise<int32_t>(mask, a, b, [](int32_t x, int32_t y) { return std::max(x, y); });
}
inline __m512i min_bytes(__m512i a, __m512i b) {
  return pairwise<uint8_t>(kAll, a, b, [](uint8_t x, uint8_t y) { return std::min(x, y); });
}
inline __m512i choose(__m512i otherwise, uint64_t mask, __m512i a) {
  const auto x = lanes<int32_t>(a), y = lanes<int32_t>(otherwise);
  return each<__m512i, int32_t>(kAll, [&](int i) { return mask >> i & 1 ? x.v[i] : y.v[i]; });
}
inline __m512i shift_left(uint64_t mask, __m512i a, int count) {
  const auto x = lanes<uint32_t>(a);
  return each<__m512i, uint32_t>(mask, [&](int i) { return x.v[i] << count; });
}
inline __m512i shift_right(uint64_t mask, __m512i a, int count) {
  const auto x = lanes<uint32_t>(a);
  return each<__m512i, uint32_t>(mask, [&](int i) { return x.v[i] >> count; });
}
template <class Vector, class T>
Vector narrow(uint64_t mask, __m512i a) {  // the low bits of each int32
  const auto x = lanes<int32_t>(a);
  return each<Vector, T>(mask, [&](int i) { return static_cast<T>(x.v[i]); });
}

// Products.

inline __m512i add_pairs(__m512i a, __m512i b) {
  const auto x = lanes<int16_t>(a), y = lanes<int16_t>(b);
  return each<__m512i, uint32_t>(kAll, [&](int i) {
    uint32_t sum = 0;
    for (int k = 2 * i; k < 2 * i + 2; ++k) sum += static_cast<uint32_t>(x.v[k] * y.v[k]);
    return sum;
  });
}
inline __m512i add_pairs_of_bytes(__m512i a, __m512i b) {
  const auto x = lanes<uint8_t>(a);
  const auto y = lanes<int8_t>(b);
  return each<__m512i, int16_t>(
      kAll, [&](int i) { return saturated<int16_t>(x.v[2 * i] * y.v[2 * i] + x.v[2 * i + 1] * y.v[2 * i + 1]); });
}
inline uint32_t four_products(const uint8_t* a, const int8_t* b) {
  return static_cast<uint32_t>(a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]);
}
inline __m512i dpbusd(__m512i sum, __m512i a, __m512i b) {
  const auto total = lanes<uint32_t>(sum);
  const auto x = lanes<uint8_t>(a);
  const auto y = lanes<int8_t>(b);
  return each<__m512i, uint32_t>(kAll, [&](int i) { return total.v[i] + four_products(x.v + 4 * i, y.v + 4 * i); });
}

// Order.

// The packs and unpacks work in each 128 bits for themselves. Narrow: what is packed into, of half the size of Wide.
template <class Wide, class Narrow>
__m512i pack(__m512i a, __m512i b) {
  constexpr int n = 16 / sizeof(Wide);  // of each operand
  const auto x = lanes<Wide>(a), y = lanes<Wide>(b);
  return each<__m512i, Narrow>(kAll, [&](int i) {
    const int part = i / (2 * n), place = i % (2 * n);
    return saturated<Narrow>(place < n ? x.v[n * part + place] : y.v[n * part + place - n]);
  });
}
template <class T, bool kHigh>
__m512i unpack(uint64_t mask, __m512i a, __m512i b) {
  constexpr int n = 16 / sizeof(T);
  const auto x = lanes<T>(a), y = lanes<T>(b);
  return each<__m512i, T>(mask, [&](int i) {
    const int place = i / n * n + (kHigh ? n / 2 : 0) + i % n / 2;
    return i % 2 == 0 ? x.v[place] : y.v[place];
  });
}
inline __m512i permute(uint64_t mask, __m512i order, __m512i a) {
  const auto places = lanes<int32_t>(order), x = lanes<int32_t>(a);
  return each<__m512i, int32_t>(mask, [&](int i) { return x.v[places.v[i] & 15]; });
}
inline __m512i shuffle(uint64_t mask, __m512i a, __m512i b, int places) {  // parts of 128 bits: two of a, two of b
  const auto x = lanes<int32_t>(a), y = lanes<int32_t>(b);
  return each<__m512i, int32_t>(mask, [&](int i) {
    const int from = 4 * (places >> (2 * (i / 4)) & 3) + i % 4;
    return i < 8 ? x.v[from] : y.v[from];
  });
}
template <class Part, class Vector, unsigned kWhole>
Part extract(unsigned mask, Vector a, int place) {  // whole parts only
  if (mask != kWhole) std::abort();
  Part result;
  std::memcpy(&result, reinterpret_cast<const char*>(&a) + sizeof(Part) * place, sizeof(Part));
  return result;
}

// Tiles.

struct Tiles {
  struct Config {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config;
  uint8_t data[8][16][64];
  bool ready = false;
};
inline thread_local Tiles tiles;

inline Tiles& configured() {  // a tile without a configuration is an invalid instruction
  if (!tiles.ready) std::abort();
  return tiles;
}
inline void load_config(const void* p) {
  static_assert(sizeof(Tiles::Config) == 64, "");
  std::memcpy(&tiles.config, p, 64);
  std::memset(tiles.data, 0, sizeof(tiles.data));
  if (tiles.config.palette != 1) std::abort();
  tiles.ready = true;
}
inline void release() {
  tiles.ready = false;
}
inline void load_tile(int tile, const void* p, int64_t stride) {
  Tiles& t = configured();
  std::memset(t.data[tile], 0, sizeof(t.data[tile]));
  for (int r = 0; r < t.config.rows[tile]; ++r) {
    std::memcpy(t.data[tile][r], static_cast<const uint8_t*>(p) + r * stride, t.config.bytes[tile]);
  }
}
inline void store_tile(int tile, void* p, int64_t stride) {
  Tiles& t = configured();
  for (int r = 0; r < t.config.rows[tile]; ++r) {
    std::memcpy(static_cast<uint8_t*>(p) + r * stride, t.data[tile][r], t.config.bytes[tile]);
  }
}
inline void multiply_tiles(int sum, int a, int b) {
  Tiles& t = configured();
  const auto& c = t.config;
  if (c.rows[sum] != c.rows[a] || c.bytes[sum] != c.bytes[b] || c.bytes[a] != 4 * c.rows[b]) std::abort();
  for (int m = 0; m < c.rows[sum]; ++m) {
    for (int n = 0; n < c.bytes[sum] / 4; ++n) {
      uint32_t total;
      std::memcpy(&total, t.data[sum][m] + 4 * n, 4);
      for (int k = 0; k < c.rows[b]; ++k) {
        total += four_products(t.data[a][m] + 4 * k, reinterpret_cast<const int8_t*>(t.data[b][k] + 4 * n));
      }
      std::memcpy(t.data[sum][m] + 4 * n, &total, 4);
    }
  }
}

}  // namespace emulated

#define __builtin_cpu_supports(feature) emulated::supports(feature)
#define __get_cpuid_count emulated::cpuid
#define syscall emulated::system_call

#define _mm512_add_ps emulated::add
#define _mm512_sub_ps emulated::sub
#define _mm512_mul_ps emulated::mul
#define _mm512_div_ps emulated::div
#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_fnmadd_ps emulated::fnmadd
#define _mm512_set1_ps emulated::set1
#define _mm512_setzero_ps() emulated::set1(0.0f)
#define _mm512_loadu_ps emulated::load
#define _mm512_storeu_ps emulated::store
#define _mm512_stream_ps emulated::stream
#define _mm512_maskz_min_ps emulated::min
#define _mm512_maskz_max_ps emulated::max
#define _mm512_cmp_ps_mask emulated::compare
#define _mm512_maskz_mov_ps emulated::mov
#define _mm512_maskz_range_ps emulated::range
#define _mm512_maskz_reduce_ps emulated::reduce
#define _mm512_maskz_scalef_ps emulated::scalef
#define _mm512_castps_si512(a) reinterpret_cast<__m512i>(a)
#define _mm512_castsi512_ps(a) reinterpret_cast<__m512>(a)

#define _mm512_maskz_cvtepu16_epi32 emulated::from_shorts
#define _mm512_maskz_cvtph_ps emulated::from_halves
#define _mm512_maskz_cvtps_ph emulated::to_halves
#define _mm512_maskz_cvtps_epi32 emulated::to_integers
#define _mm512_maskz_cvtepi32_ps emulated::from_integers
#define _mm512_maskz_cvtepi32_epi16 emulated::narrow<__m256i, int16_t>
#define _mm512_maskz_cvtepi32_epi8 emulated::narrow<__m128i, int8_t>

#define _mm512_loadu_si512 emulated::load_integers
#define _mm512_storeu_si512 emulated::store_integers
#define _mm512_maskz_loadu_epi8 emulated::load_bytes
#define _mm512_set1_epi8(value) emulated::set<int8_t>(emulated::kAll, value)
#define _mm512_set1_epi16(value) emulated::set<int16_t>(emulated::kAll, value)
#define _mm512_set1_epi32(value) emulated::set<int32_t>(emulated::kAll, value)
#define _mm512_setzero_si512() emulated::set<int32_t>(emulated::kAll, 0)
#define _mm512_maskz_set1_epi8 emulated::set<int8_t>
#define _mm512_add_epi32(a, b) emulated::add_integers(emulated::kAll, a, b)
#define _mm512_maskz_add_epi32 emulated::add_integers
#define _mm512_adds_epi16 emulated::add_saturating
#define _mm512_maskz_min_epi32 emulated::min_integers
#define _mm512_maskz_max_epi32 emulated::max_integers
#define _mm512_min_epu8 emulated::min_bytes
#define _mm512_mask_mov_epi32 emulated::choose
#define _mm512_maskz_slli_epi32 emulated::shift_left
#define _mm512_maskz_srli_epi32 emulated::shift_right
#define _mm512_and_si512(a, b) ((a) & (b))
#define _mm512_xor_si512(a, b) ((a) ^ (b))

#define _mm512_madd_epi16 emulated::add_pairs
#define _mm512_maddubs_epi16 emulated::add_pairs_of_bytes
#define _mm512_dpbusd_epi32 emulated::dpbusd

#define _mm512_packs_epi32 emulated::pack<int32_t, int16_t>
#define _mm512_packus_epi16 emulated::pack<int16_t, uint8_t>
#define _mm512_unpacklo_epi8(a, b) emulated::unpack<int8_t, false>(emulated::kAll, a, b)
#define _mm512_unpackhi_epi8(a, b) emulated::unpack<int8_t, true>(emulated::kAll, a, b)
#define _mm512_unpacklo_epi16(a, b) emulated::unpack<int16_t, false>(emulated::kAll, a, b)
#define _mm512_unpackhi_epi16(a, b) emulated::unpack<int16_t, true>(emulated::kAll, a, b)
#define _mm512_maskz_unpacklo_epi32 emulated::unpack<int32_t, false>
#define _mm512_maskz_unpackhi_epi32 emulated::unpack<int32_t, true>
#define _mm512_maskz_unpacklo_epi64 emulated::unpack<int64_t, false>
#define _mm512_maskz_unpackhi_epi64 emulated::unpack<int64_t, true>
#define _mm512_maskz_permutexvar_epi32 emulated::permute
#define _mm512_maskz_shuffle_i32x4 emulated::shuffle
#define _mm512_maskz_extractf32x4_ps emulated::extract<__m128, __m512, 0xF>
#define _mm512_maskz_extractf32x8_ps emulated::extract<__m256, __m512, 0xFF>
#define _mm512_maskz_extracti64x4_epi64 emulated::extract<__m256i, __m512i, 0xF>

#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated::set_each

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_loadd emulated::load_tile
#define _tile_stored emulated::store_tile
#define _tile_dpbusd emulated::multiply_tiles
