// Stands in for CUDA's header in tests that run a kernel on the CPU: the words of the language, and __half.
#pragma once

#include "emulator.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  const float sign = v.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24));
}

inline __half __float2half_rn(float v) {
  if (std::isnan(v)) return {0x7FFF};
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  v = std::fabs(v);
  if (v == 0.0f) return {sign};
  if (v >= 65520.0f) return {uint16_t(sign | 0x7C00)};
  int exponent = 0;
  std::frexp(v, &exponent);
  const int step = std::max(exponent, -13) - 11;  // 11 bits of the number, or as many as a subnormal one has
  const auto fraction = uint32_t(std::nearbyint(std::ldexp(v, -step)));
  return {uint16_t(sign | (uint32_t(step + 24) * 1024 + fraction))};  // a carry or the hidden bit goes to the exponent
}
