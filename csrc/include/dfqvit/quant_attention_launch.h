// What csrc/cuda/quant_attention_kernels.cu offers to the binding. No torch headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dfqvit {
namespace quant {
namespace attention {

// Pointers are to memory of the device; qkv at a multiple of 16.
struct Heads {
  const uint8_t* qkv;  // [windows of all images, tokens, 3 * heads * depth]
  const int32_t* index;
  const float *bias, *mask;  // [heads, tokens, tokens] and [windows, tokens, tokens], or null
  const float *in_scale, *in_zero;
  float scale;                        // of the softmax
  const float *out_scale, *out_zero;  // or null, for a float32 result
  float out_greatest;
  void* out;
  int heads, tokens, depth, windows;
  const float* head_scale;  // [heads], or null
};

// The heads of all windows of all images: `blocks` of them, at most 2^31 - 1.
cudaError_t launch_attention(const Heads& heads, int64_t blocks, cudaStream_t stream);

}  // namespace attention
}  // namespace quant
}  // namespace dfqvit
