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
  for (auto& t : total) asm volatile("" : : "v"(t));
  return kRounds * 12 * 64;
}
#endif

}  // namespace

double int8_peak(Isa isa) {
  double best = 0;
#if DFQVIT_X86
  if (isa < Isa::avx512 || !has_avx512_vnni()) return 0;
  for (int i = 0; i < 20; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    const int64_t products = isa == Isa::amx ? multiply_tiles() : multiply_vectors();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::max(best, static_cast<double>(products) / seconds.count());
  }
#else
  (void)isa;
#endif
  return best;
}

}  // namespace dfqvit
