// Launches of the kernel in dfqvit/quant_attention.cuh. No torch headers.
#include "dfqvit/quant_attention.cuh"

namespace dfqvit {
namespace quant {
namespace attention {
namespace {

template <int kDepth, bool kAddends>
cudaError_t launch(const Heads& p, int64_t blocks, cudaStream_t stream) {
  const int bytes = shared_bytes<kDepth>(p.tokens);
  const auto kernel = attention_kernel<kDepth, kAddends>;
  if (bytes > 48 << 10) {  // more than a kernel has unasked
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), 32 * warps_for<kDepth, kAddends>(p.tokens), bytes, stream>>>(p);
  return cudaGetLastError();
}

template <int kDepth>
cudaError_t launch(const Heads& p, int64_t blocks, cudaStream_t stream) {
  return p.bias || p.mask ? launch<kDepth, true>(p, blocks, stream) : launch<kDepth, false>(p, blocks, stream);
}

}  // namespace

cudaError_t launch_attention(const Heads& p, int64_t blocks, cudaStream_t stream) {
  if (p.depth <= 32) return launch<32>(p, blocks, stream);
  if (p.depth <= 64) return launch<64>(p, blocks, stream);
  if (p.depth <= 96) return launch<96>(p, blocks, stream);
  return launch<128>(p, blocks, stream);
}

}  // namespace attention
}  // namespace quant
}  // namespace dfqvit
