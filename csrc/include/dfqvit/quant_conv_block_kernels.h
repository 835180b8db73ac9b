// The depthwise convolution of quant_conv_block for every CPU path. No torch headers.
#pragma once

#include "dfqvit/quant_linear.h"

namespace dfqvit {
namespace quant {

// A depthwise convolution with an odd size, at every pixel, with zeros around the image.
struct Depthwise {
  const float* weight;  // [size * size, channels]
  const float* bias;    // [channels]
  int64_t channels, size;
  int64_t height, width;  // of an image
};

}  // namespace quant
}  // namespace dfqvit

#define DFQVIT_BODY "dfqvit/quant_conv_block_body.h"
#include "dfqvit/each_path.h"

namespace dfqvit {
namespace quant {

using DepthwiseKernel = void (*)(const float* image, const Depthwise&, int64_t begin, int64_t end, float* out);

// Defined in csrc/cpu/quant_conv_block_kernels.cpp, so that the paths are compiled there alone.
DepthwiseKernel depthwise_kernel_for(Isa isa);

}  // namespace quant
}  // namespace dfqvit
