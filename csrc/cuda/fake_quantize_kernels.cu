// Launches of the kernel in dfqvit/fake_quantize.cuh. No torch headers.
#include "dfqvit/fake_quantize.cuh"
#include "dfqvit/fake_quantize_launch.h"

namespace dfqvit {

template <typename T>
cudaError_t launch_fake_quantize(const T* grad, const T* x, T* y, const float* scale, const float* zero_point,
                                 int64_t n, int64_t channels, int64_t inner, float quant_min, float quant_max,
                                 cudaStream_t stream) {
  const auto kernel = grad ? fake_quantize_kernel<T, true> : fake_quantize_kernel<T, false>;
  kernel<<<static_cast<int>(fake_quantize_blocks(n)), kFakeThreads, 0, stream>>>(grad, x, y, scale, zero_point, n,
                                                                                 channels, inner, quant_min, quant_max);
  return cudaGetLastError();
}

#define DFQVIT_INSTANTIATE(T)                                                                                     \
  template cudaError_t launch_fake_quantize(const T*, const T*, T*, const float*, const float*, int64_t, int64_t, \
                                            int64_t, float, float, cudaStream_t);
DFQVIT_INSTANTIATE(float)
DFQVIT_INSTANTIATE(__half)
DFQVIT_INSTANTIATE(__nv_bfloat16)
#undef DFQVIT_INSTANTIATE

}  // namespace dfqvit
