// Launches of the kernel in dfqvit/quant_attention.cuh. No torch headers.
#include "dfqvit/quant_attention.cuh"

namespace dfqvit {
namespace quant {
namespace attention {
namespace {

template <int kDepth, int kKept, bool kAddends>
cudaError_t launch(const Heads& p, int64_t blocks, cudaStream_t stream) {
  int device = 0, shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error != cudaSuccess) return error;
  const int warps = warps_for<kDepth, kKept>(p.tokens, shared), bytes = shared_bytes<kDepth, kKept>(p.tokens, warps);
  const auto kernel = attention_kernel<kDepth, kKept, kAddends>;
  if (bytes > 48 << 10) {  // more than a kernel has unasked
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), 32 * warps, bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_attention(const Heads& p, int64_t blocks, cudaStream_t stream) {
  return with_shape(p, [&](auto depth, auto kept) {
    constexpr int kDepth = decltype(depth)::value, kKept = decltype(kept)::value;
    return p.bias || p.mask ? launch<kDepth, kKept, true>(p, blocks, stream)
                            : launch<kDepth, kKept, false>(p, blocks, stream);
  });
}

}  // namespace attention
}  // namespace quant
}  // namespace dfqvit
