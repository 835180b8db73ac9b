// What csrc/cuda/patch_similarity_entropy_kernels.cu offers to the binding. Pointers are to memory of the device; T is
// float, __half or __nv_bfloat16. No torch headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dfqvit/patch_similarity_entropy.h"

namespace dfqvit {
namespace entropy {
namespace cuda {

constexpr int kMaxPoints = 512;
constexpr int kRowsOfBlock = 8;        // that a block normalises, a warp each
constexpr int kSharedGradDepth = 128;  // up to this depth the gradient of a block's rows is summed in shared memory

// The vectors of all sets: sets x [n, depth], row-major, with 1 / max(length, kNormFloor) and the squared unit length.
template <typename T>
struct Sets {
  const T* x;
  const float* inverse;
  const float* diagonal;
  int64_t n, depth;

  DFQVIT_HOST_DEVICE int64_t tiles() const { return (n + kTile - 1) / kTile; }
  DFQVIT_HOST_DEVICE int64_t pairs() const { return tiles() * (tiles() + 1) / 2; }  // of tiles, each once
};

// Each gives the error of its launches. `sets` are `count`, at most 2^31 - 1 pairs of tiles in all.
template <typename T>
cudaError_t launch_normalise(const T* x, float* inverse, float* diagonal, int64_t rows, int64_t depth,
                             cudaStream_t stream);

// result [layers, 2] = the least and the greatest similarity of each layer; ends [count * pairs, 2] is room.
template <typename T>
cudaError_t launch_range(const Sets<T>& sets, int64_t count, int64_t layers, float* ends, float* result,
                         cudaStream_t stream);

// density [layers, images, points] and entropy [layers, images]; parts [count * pairs, points] is room. A layer has
// `batch` sets, which are `windows` of each image.
template <typename T>
cudaError_t launch_density(const Sets<T>& sets, int64_t count, const float* ends, int64_t batch, int64_t windows,
                           int points, float bandwidth, double* parts, float* density, T* entropy, cudaStream_t stream);

// out [count, n, depth] = the gradient of the vectors; `room` as long, for depth > kSharedGradDepth.
template <typename T>
cudaError_t launch_backward(const Sets<T>& sets, int64_t count, const float* ends, const float* density,
                            const float* grad, int64_t batch, int64_t windows, int points, float bandwidth, float* room,
                            T* out, cudaStream_t stream);

}  // namespace cuda
}  // namespace entropy
}  // namespace dfqvit
