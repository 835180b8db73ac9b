// Stands in for CUDA's header in tests that run a kernel on the CPU.
#pragma once

#include "emulator.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t word = uint32_t(v.bits) << 16;
  float result;
  std::memcpy(&result, &word, 4);
  return result;
}

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t word;
  std::memcpy(&word, &v, 4);
  return {uint16_t((word + 0x7FFF + (word >> 16 & 1)) >> 16)};
}
