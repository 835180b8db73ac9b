// What is quant_conv_block's own for every CPU path: the depthwise convolution, and the sums of a response norm. No
// torch headers.
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

struct ConvKernels {
  // Pixels begin to end of one image [height, width, channels], to [end - begin, channels].
  void (*depthwise)(const float* image, const Depthwise&, int64_t begin, int64_t end, float* out);
  // The sum over rows of each channel's squares, in the rows' order, of float [count, channels]; to float [channels].
  void (*sum_squares)(const float* rows, int64_t count, int64_t channels, float* sums);
};

// Defined in csrc/cpu/quant_conv_block_kernels.cpp, so that the paths are compiled there alone.
ConvKernels conv_kernels_for(Isa isa);

}  // namespace quant
}  // namespace dfqvit
