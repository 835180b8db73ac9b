// Launches of the kernels in dfqvit/patch_similarity_entropy.cuh. No torch headers.
#include "dfqvit/patch_similarity_entropy.cuh"

namespace dfqvit {
namespace entropy {
namespace cuda {
namespace {

template <typename Kernel>
cudaError_t allow_shared(Kernel* kernel, int64_t bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

}  // namespace

template <typename T>
cudaError_t launch_normalise(const T* x, float* inverse, float* diagonal, int64_t rows, int64_t depth,
                             cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((rows + kRowsOfBlock - 1) / kRowsOfBlock);
  normalise_kernel<<<blocks, kRowThreads, 0, stream>>>(x, inverse, diagonal, rows, depth);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_range(const Sets<T>& sets, int64_t count, int64_t layers, float* ends, float* result,
                         cudaStream_t stream) {
  const int64_t blocks = count * sets.pairs(), shared = tile_shared_bytes();
  cudaError_t error = allow_shared(range_kernel<T>, shared);
  if (error != cudaSuccess) return error;
  range_kernel<T><<<static_cast<unsigned>(blocks), kThreads, shared, stream>>>(sets, ends);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  finish_range_kernel<<<static_cast<unsigned>(layers), 32, 0, stream>>>(ends, blocks / layers, result);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_density(const Sets<T>& sets, int64_t count, const float* ends, int64_t batch, int64_t windows,
                           int points, float bandwidth, double* parts, float* density, T* entropy,
                           cudaStream_t stream) {
  const int64_t shared = tile_shared_bytes(), images = batch / windows;
  cudaError_t error = allow_shared(density_kernel<T>, shared);
  if (error != cudaSuccess) return error;
  density_kernel<T><<<static_cast<unsigned>(count * sets.pairs()), kThreads, shared, stream>>>(
      sets, ends, batch, points, bandwidth, parts);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  finish_density_kernel<<<static_cast<unsigned>(count / windows), kRowThreads, 0, stream>>>(
      parts, sets.diagonal, ends, sets.n, sets.pairs(), windows, images, points, bandwidth, density, entropy);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_backward(const Sets<T>& sets, int64_t count, const float* ends, const float* density,
                            const float* grad, int64_t batch, int64_t windows, int points, float bandwidth, float* room,
                            T* out, cudaStream_t stream) {
  const int64_t shared = backward_shared_bytes(points, sets.depth);
  const cudaError_t error = allow_shared(backward_kernel<T>, shared);
  if (error != cudaSuccess) return error;
  backward_kernel<T><<<static_cast<unsigned>(count * sets.tiles()), kThreads, shared, stream>>>(
      sets, ends, density, grad, batch, windows, points, bandwidth, room, out);
  return cudaGetLastError();
}

#define DFQVIT_INSTANTIATE(T)                                                                                       \
  template cudaError_t launch_normalise(const T*, float*, float*, int64_t, int64_t, cudaStream_t);                  \
  template cudaError_t launch_range(const Sets<T>&, int64_t, int64_t, float*, float*, cudaStream_t);                \
  template cudaError_t launch_density(const Sets<T>&, int64_t, const float*, int64_t, int64_t, int, float, double*, \
                                      float*, T*, cudaStream_t);                                                    \
  template cudaError_t launch_backward(const Sets<T>&, int64_t, const float*, const float*, const float*, int64_t,  \
                                       int64_t, int, float, float*, T*, cudaStream_t);
DFQVIT_INSTANTIATE(float)
DFQVIT_INSTANTIATE(__half)
DFQVIT_INSTANTIATE(__nv_bfloat16)
#undef DFQVIT_INSTANTIATE

}  // namespace cuda
}  // namespace entropy
}  // namespace dfqvit
