// A contiguous copy of a strided array, such as an image's patches, by all threads. No torch headers.
#pragma once

#include <cstdint>

namespace dfqvit {

// Floats of `dims` dimensions, strides in elements, to `to`, the last dimension fastest. False, with nothing done,
// where fewer than 8 lie side by side at a time: that is for others.
bool gather(const float* from, const int64_t* sizes, const int64_t* strides, int64_t dims, float* to);

}  // namespace dfqvit
