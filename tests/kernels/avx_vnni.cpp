// The products of the path avxvnni, with its one instruction written out where EMULATED is defined: few processors have
// it. Compiled by tests/kernels/test_avx_vnni.py.
#include <immintrin.h>

#include "dfqvit/isa.h"

#ifdef EMULATED
#include <cstdint>

#undef DFQVIT_TARGET_AVXVNNI
#define DFQVIT_TARGET_AVXVNNI DFQVIT_TARGET_AVX2

namespace {

// vpdpbusd: to each int32 of `sum`, four products of unsigned and signed bytes.
DFQVIT_TARGET_AVX2 __m256i dpbusd(__m256i sum, __m256i x, __m256i w) {
  int32_t total[8];
  uint8_t a[32];
  int8_t b[32];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(total), sum);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(a), x);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(b), w);
  for (int i = 0; i < 32; ++i) total[i / 4] += a[i] * b[i];
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(total));
}

}  // namespace

#define _mm256_dpbusd_avx_epi32 dpbusd
#endif

#include "dfqvit/quant_linear_multiply.h"

using dfqvit::quant::avxvnni::kRows;

extern "C" {

int rows_of_a_tile() {
  return kRows;
}

// panels and starts: of `blocks` blocks, `panel` bytes and 16 int32 each.
void multiply(const uint8_t* a, int stride, int first, int rows, const uint8_t* panels, int panel,
              const int32_t* starts, int blocks, int depth, int32_t* sums) {
  const uint8_t* each_panel[2] = {panels, panels + panel * (blocks - 1)};
  const int32_t* each_start[2] = {starts, starts + 16 * (blocks - 1)};
  dfqvit::quant::avxvnni::multiply(a, stride, first, rows, each_panel, each_start, blocks, depth, 8, sums);
}

}  // extern "C"
