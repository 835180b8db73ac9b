// The instructions of csrc/include/dfqvit/quant_attention_ptx.cuh for a CPU, after the words of the PTX manual.
#pragma once

#include "dfqvit/quant_linear_ptx.cuh"

namespace dfqvit {
namespace quant {
namespace attention {

inline float float_of(int32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline float saturated_multiply_add(float a, float b, float c) {
  const float y = std::fma(a, b, c);
  return std::isnan(y) ? 0.0f : std::clamp(y, 0.0f, 1.0f);
}

// ldmatrix.x4.trans.b16: of each matrix lane i holds the 16-bit values of rows 2 * (i % 4) and on in column i / 4.
inline void load_transposed(uint32_t (&m)[4], uint32_t shared) {
  const uint32_t lane = threadIdx.x % 32;
  emulator::exchange<1>({shared}, [&](const uint32_t (&words)[32][6]) {
    for (uint32_t i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (uint32_t j = 0; j < 2; ++j) {
        std::memcpy(&pair[j], tile::shared_pointer(words[8 * i + lane % 4 * 2 + j][0]) + 2 * (lane / 4), 2);
      }
      std::memcpy(&m[i], pair, 4);
    }
  });
}

// mma.m16n8k32 .u8 .u8, whose operands lie as those of .u8 .s8 (quant_linear_ptx.cuh).
inline void multiply_add_unsigned(int32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = threadIdx.x % 32;
  emulator::exchange<6>({a[0], a[1], a[2], a[3], b0, b1}, [&](const uint32_t (&words)[32][6]) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
      uint32_t total = static_cast<uint32_t>(sum[i]);
      for (int k = 0; k < 32; ++k) {
        const int t = k % 16 / 4;
        const uint32_t left = words[row % 8 * 4 + t][(row >= 8 ? 1 : 0) + (k >= 16 ? 2 : 0)];
        const uint32_t right = words[column * 4 + t][4 + (k >= 16 ? 1 : 0)];
        total += (left >> 8 * (k % 4) & 255) * (right >> 8 * (k % 4) & 255);
      }
      sum[i] = static_cast<int32_t>(total);
    }
  });
}

}  // namespace attention
}  // namespace quant
}  // namespace dfqvit
