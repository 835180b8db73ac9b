// The part of dfqvit/quant_linear_multiply.h for 64-bit ARM, which includes it. No torch headers.
//
// A vector of a panel holds four weights of each of four outputs; a line, four such vectors, those of 16 outputs.
#pragma once

#include <arm_neon.h>

namespace dfqvit {
namespace quant {

// A function of its own: it would be copied into every product. GCC's scheduler would load more vectors ahead than
// there are registers for, and keep sums on the stack.
#if defined(__clang__)
#define DFQVIT_APART inline __attribute__((noinline))
#else
#define DFQVIT_APART inline __attribute__((noinline, optimize("no-schedule-insns")))
#endif

// The rows that a tile reads: past the end the last one again.
template <int kRows>
struct ArmRows {
  const uint8_t* row[kRows];

  inline __attribute__((always_inline)) ArmRows(const uint8_t* a, int64_t stride, int64_t r, int64_t rows) {
    for (int i = 0; i < kRows; ++i) row[i] = a + (r + i < rows ? r + i : rows - 1) * stride;
  }
  // 16 bytes of a row, less 128.
  inline __attribute__((always_inline)) int8x16_t signed_at(int i, int64_t place) const {
    return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(row[i] + place), vdupq_n_u8(0x80)));
  }
};

namespace neon {

constexpr int kRows = 2;
constexpr int32_t kOffset = 128;
inline void prepare(int64_t) {}
inline void release() {}

// One line, with the values 4 * lane to 4 * lane + 3 of x. A product of signed bytes fits 16 bits, the sum of two does
// not: each pair is added into 32 bits.
template <int lane>
inline __attribute__((always_inline)) void add_line(const int8_t* line, const int8x16_t* x, int32x4_t (*total)[8]) {
  for (int q = 0; q < 4; ++q) {
    const int8x16_t w = vld1q_s8(line + 16 * q);
    for (int i = 0; i < kRows; ++i) {
      const int8x16_t four = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x[i]), lane));
      total[i][2 * q] = vpadalq_s16(total[i][2 * q], vmull_s8(vget_low_s8(four), vget_low_s8(w)));
      total[i][2 * q + 1] = vpadalq_s16(total[i][2 * q + 1], vmull_high_s8(four, w));
    }
  }
}

DFQVIT_APART void multiply(const uint8_t* a, int64_t stride, int64_t r, int64_t rows, const uint8_t* const* panels,
                           const int32_t* const* starts, int blocks, int64_t depth, int, int32_t* sums) {
  const ArmRows<kRows> from(a, stride, r, rows);
  for (int j = 0; j < blocks; ++j) {
    int32x4_t total[kRows][8];  // two partial sums of each output, side by side
    for (int i = 0; i < kRows; ++i) {
      for (int t = 0; t < 8; ++t) total[i][t] = vdupq_n_s32(0);
    }
    const int8_t* line = reinterpret_cast<const int8_t*>(panels[j]);
    for (int64_t k = 0; k < depth; k += 16, line += 256) {
      int8x16_t x[kRows];
      for (int i = 0; i < kRows; ++i) x[i] = from.signed_at(i, k);
      add_line<0>(line, x, total);
      add_line<1>(line + 64, x, total);
      add_line<2>(line + 128, x, total);
      add_line<3>(line + 192, x, total);
    }
    for (int i = 0; i < kRows; ++i) {
      for (int q = 0; q < 4; ++q) {
        const int32x4_t pairs = vpaddq_s32(total[i][2 * q], total[i][2 * q + 1]);
        vst1q_s32(sums + 16 * (kRows * j + i) + 4 * q, vaddq_s32(vld1q_s32(starts[j] + 4 * q), pairs));
      }
    }
  }
}

}  // namespace neon

namespace dotprod {

constexpr int kRows = 6;
constexpr int32_t kOffset = 128;
inline void prepare(int64_t) {}
inline void release() {}

template <int lane>
DFQVIT_TARGET_DOTPROD inline __attribute__((always_inline)) void add_line(const int8_t* line, const int8x16_t* x,
                                                                          int32x4_t (*total)[4]) {
  for (int q = 0; q < 4; ++q) {
    const int8x16_t w = vld1q_s8(line + 16 * q);
    for (int i = 0; i < kRows; ++i) total[i][q] = vdotq_laneq_s32(total[i][q], w, x[i], lane);
  }
}

DFQVIT_TARGET_DOTPROD DFQVIT_APART void multiply(const uint8_t* a, int64_t stride, int64_t r, int64_t rows,
                                                 const uint8_t* const* panels, const int32_t* const* starts, int blocks,
                                                 int64_t depth, int, int32_t* sums) {
  const ArmRows<kRows> from(a, stride, r, rows);
  for (int j = 0; j < blocks; ++j) {
    int32x4_t total[kRows][4];
    for (int i = 0; i < kRows; ++i) {
      for (int q = 0; q < 4; ++q) total[i][q] = vld1q_s32(starts[j] + 4 * q);
    }
    const int8_t* line = reinterpret_cast<const int8_t*>(panels[j]);
    for (int64_t k = 0; k < depth; k += 16, line += 256) {
      int8x16_t x[kRows];
      for (int i = 0; i < kRows; ++i) x[i] = from.signed_at(i, k);
      add_line<0>(line, x, total);
      add_line<1>(line + 64, x, total);
      add_line<2>(line + 128, x, total);
      add_line<3>(line + 192, x, total);
    }
    for (int i = 0; i < kRows; ++i) {
      for (int q = 0; q < 4; ++q) vst1q_s32(sums + 16 * (kRows * j + i) + 4 * q, total[i][q]);
    }
  }
}

}  // namespace dotprod

namespace i8mm {

constexpr int kRows = 6;
constexpr int kPairs = kRows / 2;
constexpr int32_t kOffset = 0;
inline void prepare(int64_t) {}
inline void release() {}

// usmmla multiplies two rows of eight values with two outputs of eight weights: the weights of two lines, zipped by
// words. Its sums are those of an output pair for the first row, then for the second.
DFQVIT_TARGET_I8MM DFQVIT_APART void multiply(const uint8_t* a, int64_t stride, int64_t r, int64_t rows,
                                              const uint8_t* const* panels, const int32_t* const* starts, int blocks,
                                              int64_t depth, int, int32_t* sums) {
  const ArmRows<kRows> from(a, stride, r, rows);
  for (int j = 0; j < blocks; ++j) {
    int32x4_t total[kPairs][8];
    for (int t = 0; t < 8; ++t) {
      const int32x2_t start = vld1_s32(starts[j] + 2 * t);
      for (int p = 0; p < kPairs; ++p) total[p][t] = vcombine_s32(start, start);
    }
    const int32_t* line = reinterpret_cast<const int32_t*>(panels[j]);
    for (int64_t k = 0; k < depth; k += 8, line += 32) {
      uint8x16_t x[kPairs];
      for (int p = 0; p < kPairs; ++p) {
        x[p] = vcombine_u8(vld1_u8(from.row[2 * p] + k), vld1_u8(from.row[2 * p + 1] + k));
      }
      for (int q = 0; q < 4; ++q) {
        const int32x4_t early = vld1q_s32(line + 4 * q), late = vld1q_s32(line + 16 + 4 * q);
        const int8x16_t first = vreinterpretq_s8_s32(vzip1q_s32(early, late));
        const int8x16_t second = vreinterpretq_s8_s32(vzip2q_s32(early, late));
        for (int p = 0; p < kPairs; ++p) {
          total[p][2 * q] = vusmmlaq_s32(total[p][2 * q], x[p], first);
          total[p][2 * q + 1] = vusmmlaq_s32(total[p][2 * q + 1], x[p], second);
        }
      }
    }
    for (int p = 0; p < kPairs; ++p) {
      int32_t* to = sums + 16 * (kRows * j + 2 * p);
      for (int t = 0; t < 8; ++t) {
        vst1_s32(to + 2 * t, vget_low_s32(total[p][t]));
        vst1_s32(to + 16 + 2 * t, vget_high_s32(total[p][t]));
      }
    }
  }
}

}  // namespace i8mm

#undef DFQVIT_APART
}  // namespace quant
}  // namespace dfqvit
