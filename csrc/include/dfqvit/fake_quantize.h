// The arithmetic of fake quantization, shared by the CPU and the CUDA kernel. No torch headers.
#pragma once

#include <cmath>
#include <cstdint>

#include "dfqvit/host_device.h"

namespace dfqvit {

// q = round(x / scale) + zero_point, half to even, not yet clamped. NaN stays NaN.
DFQVIT_HOST_DEVICE float quantize_unclamped(float x, float scale, float zero_point) {
  return nearbyintf(x / scale) + zero_point;
}

// (clamp(q, quant_min, quant_max) - zero_point) * scale. NaN stays NaN: both comparisons are false for it.
DFQVIT_HOST_DEVICE float fake_quantize_value(float x, float scale, float zero_point, float quant_min, float quant_max) {
  float q = quantize_unclamped(x, scale, zero_point);
  q = q < quant_min ? quant_min : q;
  q = q > quant_max ? quant_max : q;
  return (q - zero_point) * scale;
}

// The straight-through gradient: grad where q lies in [quant_min, quant_max], zero where it was clamped.
DFQVIT_HOST_DEVICE float fake_quantize_grad(float grad, float x, float scale, float zero_point, float quant_min,
                                            float quant_max) {
  const float q = quantize_unclamped(x, scale, zero_point);
  return (q < quant_min || q > quant_max) ? 0.0f : grad;
}

}  // namespace dfqvit
