// What the arithmetic of quant_linear could reach at most on this processor: products of registers, no memory.
#include "dfqvit/int8_peak.h"

#include <algorithm>
#include <chrono>

#include "dfqvit/quant_linear_multiply.h"

namespace dfqvit {
namespace {

constexpr int64_t kRounds = 1 << 15;

#if DFQVIT_X86
DFQVIT_TARGET_AMX int64_t multiply_tiles() {
  quant::amx::prepare(32);
  for (int64_t i = 0; i < kRounds; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  quant::amx::release();
  return kRounds * 4 * 16 * 16 * 64;
}

DFQVIT_TARGET_VNNI int64_t multiply_vectors() {
  __m512i total[12];
  for (auto& t : total) t = _mm512_setzero_si512();
  const __m512i x = _mm512_set1_epi8(3);
  for (int64_t i = 0; i < kRounds; ++i) {
    for (auto& t : total) t = _mm512_dpbusd_epi32(t, x, x);
  }
  for (auto& t : total) asm volatile("" : : "vm"(t));
  return kRounds * 12 * 64;
}

int64_t multiply_once(Isa isa) {
  if (isa < Isa::avx512 || !has_avx512_vnni()) return 0;
  return isa == Isa::amx ? multiply_tiles() : multiply_vectors();
}
#elif DFQVIT_ARM
DFQVIT_TARGET_DOTPROD int64_t multiply_dots() {
  int32x4_t total[24];
  for (auto& t : total) t = vdupq_n_s32(0);
  const int8x16_t x = vdupq_n_s8(3);
  for (int64_t i = 0; i < kRounds; ++i) {
    for (auto& t : total) t = vdotq_laneq_s32(t, x, x, 1);
  }
  for (auto& t : total) asm volatile("" : : "w"(t));
  return kRounds * 24 * 16;
}

DFQVIT_TARGET_I8MM int64_t multiply_matrices() {
  int32x4_t total[24];
  for (auto& t : total) t = vdupq_n_s32(0);
  const int8x16_t x = vdupq_n_s8(3);
  for (int64_t i = 0; i < kRounds; ++i) {
    for (auto& t : total) t = vusmmlaq_s32(t, vreinterpretq_u8_s8(x), x);
  }
  for (auto& t : total) asm volatile("" : : "w"(t));
  return kRounds * 24 * 32;
}

int64_t multiply_once(Isa isa) {
  return isa == Isa::i8mm ? multiply_matrices() : isa == Isa::dotprod ? multiply_dots() : 0;
}
#else
int64_t multiply_once(Isa) {
  return 0;
}
#endif

}  // namespace

double int8_peak(Isa isa) {
  double best = 0;
  for (int i = 0; i < 20; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    const int64_t products = multiply_once(isa);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    if (products == 0) return 0;
    best = std::max(best, static_cast<double>(products) / seconds.count());
  }
  return best;
}

}  // namespace dfqvit
