// The integer products of each CPU path: `multiply` sums some rows times one or two blocks. No torch headers.
//
// Each path has kRows, the most rows of a tile; kOffset, what it takes from each value of a, so that the caller's
// `starts` have kOffset times the sum of each output's weights more; and
//   prepare(rows), release()   around all the tiles of a product with `rows` rows, on the thread that computes them;
//   multiply(a, stride, r, rows, panels, starts, blocks, depth, bits, sums)
//     rows r to min(r + kRows, rows) of a, uint8 with `stride` bytes from row to row, readable to whole chunks of 64;
//     depth: K; from there to whole chunks the panels are 0, and a path multiplies as little of it as it can;
//     panels: `blocks` (1 or 2) unpacked blocks, 1024 bytes for each chunk;
//     bits: that each weight fits, as a signed integer;
//     starts: for each block the 16 int32 that every row's sums begin at;
//     sums: [blocks][kRows][16] int32. Rows beyond the last are not written, or hold nothing of use; kHeadroom int32
//     before it may be written too.
#pragma once

#include <cstdint>
#include <cstring>

#include "dfqvit/isa.h"

#if DFQVIT_X86
#include <immintrin.h>
#endif

namespace dfqvit {
namespace quant {

constexpr int kHeadroom = 256;

namespace portable {

constexpr int kRows = 1;
constexpr int32_t kOffset = 0;
inline void prepare(int64_t) {}
inline void release() {}

inline void multiply(const uint8_t* a, int64_t stride, int64_t r, int64_t, const uint8_t* const* panels,
                     const int32_t* const* starts, int blocks, int64_t depth, int, int32_t* sums) {
  for (int j = 0; j < blocks; ++j) {
    int32_t total[16];
    std::memcpy(total, starts[j], sizeof(total));
    const uint8_t* row = a + r * stride;
    const int8_t* panel = reinterpret_cast<const int8_t*>(panels[j]);
    for (int64_t v = 0; 4 * v < depth; ++v, row += 4, panel += 64) {
      for (int n = 0; n < 16; ++n) {
        const int8_t* w = panel + 4 * n;
        total[n] += row[0] * w[0] + row[1] * w[1] + row[2] * w[2] + row[3] * w[3];
      }
    }
    std::memcpy(sums + 16 * j, total, sizeof(total));
  }
}

}  // namespace portable

#if DFQVIT_X86
namespace avx2 {

constexpr int kRows = 4;
constexpr int32_t kOffset = 0;
inline void prepare(int64_t) {}
inline void release() {}

// Holds a sum in its register: GCC would add products to each other first, of more vectors than there are registers.
DFQVIT_TARGET_AVX2 inline __attribute__((always_inline)) void keep(__m256i& sum) {
  asm("" : "+x"(sum));
}

DFQVIT_TARGET_AVX2 inline __attribute__((always_inline)) __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
DFQVIT_TARGET_AVX2 inline __attribute__((always_inline)) void store(void* to, __m256i x) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), x);
}

// Weights of up to kNarrow bits: products of bytes, added in pairs (vpmaddubsw), fit 16 bits, and so does the sum of
// kLines of these: 255 * 8 * 2 * 8 = 32640.
constexpr int kNarrow = 4, kLines = 8;

DFQVIT_TARGET_AVX2 inline void multiply_narrow(const uint8_t* const* row, const uint8_t* panel, const int32_t* start,
                                               int64_t depth, int32_t* sums) {
  for (int i = 0; i < kRows; ++i) {
    for (int q = 0; q < 2; ++q) store(sums + 16 * i + 8 * q, load(start + 8 * q));
  }
  for (int64_t k = 0; k < depth; k += 4 * kLines) {
    __m256i few[kRows][2] = {};
#pragma GCC unroll 8
    for (int line = 0; line < kLines; ++line, panel += 64) {
      const __m256i w[2] = {load(panel), load(panel + 32)};
      for (int i = 0; i < kRows; ++i) {
        int32_t four;
        std::memcpy(&four, row[i] + k + 4 * line, sizeof(four));
        const __m256i x = _mm256_set1_epi32(four);
        for (int q = 0; q < 2; ++q) {
          few[i][q] = _mm256_add_epi16(few[i][q], _mm256_maddubs_epi16(x, w[q]));
          keep(few[i][q]);
        }
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int q = 0; q < 2; ++q) {
        int32_t* to = sums + 16 * i + 8 * q;
        store(to, _mm256_add_epi32(load(to), _mm256_madd_epi16(few[i][q], _mm256_set1_epi16(1))));
      }
    }
  }
}

// Weights of up to kPairs bits: the products of a pair fit, 255 * 64 * 2 = 32640, and are added in 32 bits. Unrolled by
// word: else GCC keeps the array of sums in memory, a load and a store at every product.
constexpr int kPairs = 7;

DFQVIT_TARGET_AVX2 inline void multiply_pairs(const uint8_t* const* row, const uint8_t* panel, const int32_t* start,
                                              int64_t depth, int32_t* sums) {
  __m256i total[kRows][2];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int q = 0; q < 2; ++q) total[i][q] = load(start + 8 * q);
  }
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t k = 0; k < depth; k += 4, panel += 64) {
    const __m256i w[2] = {load(panel), load(panel + 32)};
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      int32_t four;
      std::memcpy(&four, row[i] + k, sizeof(four));
      const __m256i x = _mm256_set1_epi32(four);
#pragma GCC unroll 2
      for (int q = 0; q < 2; ++q) {
        total[i][q] = _mm256_add_epi32(total[i][q], _mm256_madd_epi16(_mm256_maddubs_epi16(x, w[q]), ones));
        keep(total[i][q]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int q = 0; q < 2; ++q) store(sums + 16 * i + 8 * q, total[i][q]);
  }
}

// Others are widened to 16 bits, where vpmaddubsw would saturate: of four values and of four weights the first and the
// third stand in one vector, the second and the fourth in another. Values for kPiece of K at a time.
constexpr int64_t kPiece = 512;

struct alignas(32) Widened {
  int32_t even[kPiece / 4], odd[kPiece / 4];

  DFQVIT_TARGET_AVX2 void take(const uint8_t* row, int64_t count) {
    for (int64_t k = 0; k < count; k += 32) {
      const __m256i bytes = load(row + k);
      store(even + k / 4, _mm256_and_si256(bytes, _mm256_set1_epi16(255)));
      store(odd + k / 4, _mm256_srli_epi16(bytes, 8));
    }
  }
};

DFQVIT_TARGET_AVX2 inline void multiply_wide(const Widened* rows, const uint8_t* panel, int64_t count, int32_t* sums) {
  __m256i total[kRows][2];
  for (int i = 0; i < kRows; ++i) {
    for (int q = 0; q < 2; ++q) total[i][q] = load(sums + 16 * i + 8 * q);
  }
  for (int64_t v = 0; 4 * v < count; ++v, panel += 64) {
    __m256i even[2], odd[2];
    for (int q = 0; q < 2; ++q) {
      const __m256i bytes = load(panel + 32 * q);
      even[q] = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
      odd[q] = _mm256_srai_epi16(bytes, 8);
    }
    for (int i = 0; i < kRows; ++i) {
      const __m256i x = _mm256_set1_epi32(rows[i].even[v]), y = _mm256_set1_epi32(rows[i].odd[v]);
      for (int q = 0; q < 2; ++q) {
        total[i][q] = _mm256_add_epi32(total[i][q], _mm256_madd_epi16(x, even[q]));
        keep(total[i][q]);
      }
      for (int q = 0; q < 2; ++q) {
        total[i][q] = _mm256_add_epi32(total[i][q], _mm256_madd_epi16(y, odd[q]));
        keep(total[i][q]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int q = 0; q < 2; ++q) store(sums + 16 * i + 8 * q, total[i][q]);
  }
}

DFQVIT_TARGET_AVX2 inline void multiply(const uint8_t* a, int64_t stride, int64_t r, int64_t rows,
                                        const uint8_t* const* panels, const int32_t* const* starts, int blocks,
                                        int64_t depth, int bits, int32_t* sums) {
  const uint8_t* row[kRows];
  for (int i = 0; i < kRows; ++i) row[i] = a + (r + i < rows ? r + i : rows - 1) * stride;
  if (bits <= kPairs) {
    const auto multiply = bits <= kNarrow ? multiply_narrow : multiply_pairs;
    for (int j = 0; j < blocks; ++j) multiply(row, panels[j], starts[j], depth, sums + 16 * kRows * j);
    return;
  }
  for (int j = 0; j < blocks; ++j) {
    for (int i = 0; i < kRows; ++i) std::memcpy(sums + 16 * (kRows * j + i), starts[j], 16 * sizeof(int32_t));
  }
  Widened widened[kRows];
  for (int64_t k = 0; k < depth; k += kPiece) {
    const int64_t count = depth - k < kPiece ? depth - k : kPiece;
    for (int i = 0; i < kRows; ++i) widened[i].take(row[i] + k, count);
    for (int j = 0; j < blocks; ++j) multiply_wide(widened, panels[j] + 16 * k, count, sums + 16 * kRows * j);
  }
}

}  // namespace avx2

#if DFQVIT_AVXVNNI
namespace avxvnni {

constexpr int kRows = 6;
constexpr int32_t kOffset = 0;
inline void prepare(int64_t) {}
inline void release() {}

DFQVIT_TARGET_AVXVNNI inline void multiply(const uint8_t* a, int64_t stride, int64_t r, int64_t rows,
                                           const uint8_t* const* panels, const int32_t* const* starts, int blocks,
                                           int64_t depth, int, int32_t* sums) {
  const uint8_t* row[kRows];
  for (int i = 0; i < kRows; ++i) row[i] = a + (r + i < rows ? r + i : rows - 1) * stride;
  for (int j = 0; j < blocks; ++j) {
    __m256i total[kRows][2];
    for (int i = 0; i < kRows; ++i) {
      for (int q = 0; q < 2; ++q) total[i][q] = avx2::load(starts[j] + 8 * q);
    }
    for (int64_t v = 0; 4 * v < depth; ++v) {
      const __m256i w[2] = {avx2::load(panels[j] + 64 * v), avx2::load(panels[j] + 64 * v + 32)};
      for (int i = 0; i < kRows; ++i) {
        int32_t four;
        std::memcpy(&four, row[i] + 4 * v, sizeof(four));
        const __m256i x = _mm256_set1_epi32(four);
        for (int q = 0; q < 2; ++q) total[i][q] = _mm256_dpbusd_avx_epi32(total[i][q], x, w[q]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int q = 0; q < 2; ++q) avx2::store(sums + 16 * (kRows * j + i) + 8 * q, total[i][q]);
    }
  }
}

}  // namespace avxvnni
#endif

namespace avx512 {

constexpr int kRows = 8;
constexpr int32_t kOffset = 0;
inline void prepare(int64_t) {}
inline void release() {}

// kTile rows. Unrolled by word, as multiply_pairs is. Not inlined: it would stand in every kernel with an epilogue.
template <int kTile, int kBlocks>
DFQVIT_TARGET_VNNI __attribute__((noinline)) void multiply(const uint8_t* const* row, const uint8_t* const* panels,
                                                           const int32_t* const* starts, int64_t depth, int32_t* sums) {
  __m512i total[kTile][kBlocks];
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) total[i][j] = _mm512_loadu_si512(starts[j]);
  }
  for (int64_t v = 0; 4 * v < depth; ++v) {
    __m512i w[kBlocks];
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) w[j] = _mm512_loadu_si512(panels[j] + 64 * v);
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
      int32_t four;
      std::memcpy(&four, row[i] + 4 * v, sizeof(four));
      const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 2
      for (int j = 0; j < kBlocks; ++j) total[i][j] = _mm512_dpbusd_epi32(total[i][j], x, w[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kBlocks; ++j) _mm512_storeu_si512(sums + 16 * (kRows * j + i), total[i][j]);
  }
}

// The last tile is about as high as it must be: 25 rows are three tiles and a low one.
template <int kBlocks>
constexpr decltype(&multiply<8, kBlocks>) kMultiply[kRows] = {
    multiply<1, kBlocks>, multiply<2, kBlocks>, multiply<4, kBlocks>, multiply<4, kBlocks>,
    multiply<6, kBlocks>, multiply<6, kBlocks>, multiply<8, kBlocks>, multiply<8, kBlocks>};

DFQVIT_TARGET_VNNI inline void multiply(const uint8_t* a, int64_t stride, int64_t r, int64_t rows,
                                        const uint8_t* const* panels, const int32_t* const* starts, int blocks,
                                        int64_t depth, int, int32_t* sums) {
  const uint8_t* row[kRows];  // past the end the last row again
  for (int i = 0; i < kRows; ++i) row[i] = a + (r + i < rows ? r + i : rows - 1) * stride;
  const int64_t last = rows - r < kRows ? rows - r - 1 : kRows - 1;
  (blocks == 2 ? kMultiply<2>[last] : kMultiply<1>[last])(row, panels, starts, depth, sums);
}

}  // namespace avx512

namespace amx {

constexpr int kRows = 32;
constexpr int32_t kOffset = 0;

// Tiles 0 to 3: sums; 4, 5: rows of a; 6, 7: panels.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

DFQVIT_TARGET_AMX inline void prepare(int64_t rows) {
  TileConfig config;
  if (rows < 16) std::memset(config.rows, static_cast<int>(rows), 6);
  asm volatile("" : : "r"(&config) : "memory");  // GCC's intrinsic says that it reads only the first bytes
  _tile_loadconfig(&config);
}

DFQVIT_TARGET_AMX inline void release() {
  _tile_release();
}

template <int kTiles, int kBlocks>
DFQVIT_TARGET_AMX inline void multiply(const uint8_t* a0, const uint8_t* a1, int64_t stride, const uint8_t* w0,
                                       const uint8_t* w1, const int32_t* const* starts, int64_t depth, int32_t* to0,
                                       int32_t* to1) {
  // with a stride of 0 every row of a tile is the same 16 values
  _tile_loadd(0, starts[0], 0);
  if (kBlocks == 2) _tile_loadd(1, starts[1], 0);
  if (kTiles == 2) _tile_loadd(2, starts[0], 0);
  if (kTiles == 2 && kBlocks == 2) _tile_loadd(3, starts[1], 0);
  for (int64_t k = 0; k < depth; k += 64) {
    _tile_loadd(6, w0, 64);
    _tile_loadd(4, a0, stride);
    _tile_dpbusd(0, 4, 6);
    if (kBlocks == 2) {
      _tile_loadd(7, w1, 64);
      _tile_dpbusd(1, 4, 7);
    }
    if (kTiles == 2) {
      _tile_loadd(5, a1, stride);
      _tile_dpbusd(2, 5, 6);
      if (kBlocks == 2) _tile_dpbusd(3, 5, 7);
    }
    w0 += 1024;
    w1 += 1024;
    a0 += 64;
    a1 += 64;
  }
  _tile_stored(0, to0, 64);
  if (kBlocks == 2) _tile_stored(1, to0 + kRows * 16, 64);
  if (kTiles == 2) _tile_stored(2, to1, 64);
  if (kTiles == 2 && kBlocks == 2) _tile_stored(3, to1 + kRows * 16, 64);
}

// A tile that would end beyond the last row starts earlier; the sums of the rows it repeats land where they belong, or
// in the headroom.
DFQVIT_TARGET_AMX inline void multiply(const uint8_t* a, int64_t stride, int64_t r, int64_t rows,
                                       const uint8_t* const* panels, const int32_t* const* starts, int blocks,
                                       int64_t depth, int, int32_t* sums) {
  const int64_t last = rows < 16 ? 0 : rows - 16;
  const int64_t r0 = r < last ? r : last, r1 = r + 16 < last ? r + 16 : last;
  const uint8_t *a0 = a + r0 * stride, *a1 = a + r1 * stride, *w0 = panels[0], *w1 = panels[blocks - 1];
  int32_t *to0 = sums + (r0 - r) * 16, *to1 = sums + (r1 - r) * 16;
  if (r + 16 < rows && blocks == 2) {
    multiply<2, 2>(a0, a1, stride, w0, w1, starts, depth, to0, to1);
  } else if (r + 16 < rows) {
    multiply<2, 1>(a0, a1, stride, w0, w1, starts, depth, to0, to1);
  } else if (blocks == 2) {
    multiply<1, 2>(a0, a0, stride, w0, w1, starts, depth, to0, to0);
  } else {
    multiply<1, 1>(a0, a0, stride, w0, w1, starts, depth, to0, to0);
  }
}

}  // namespace amx
#endif  // DFQVIT_X86

}  // namespace quant
}  // namespace dfqvit

#if DFQVIT_ARM
#include "dfqvit/quant_linear_multiply_arm.h"
#endif
