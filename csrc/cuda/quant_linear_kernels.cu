// Launches of the kernels in dfqvit/quant_linear.cuh. No torch headers.
#include <cuda.h>

#include <algorithm>

#include "dfqvit/quant_linear.cuh"
#include "dfqvit/quant_linear_tiles.cuh"

namespace dfqvit {
namespace quant {
namespace tile {
namespace {

unsigned blocks_for(int64_t rows) {
  return static_cast<unsigned>((rows + kRowsAtOnce - 1) / kRowsAtOnce);
}

// Calls `run` with the bits as a constant of its argument's type.
template <typename Run>
cudaError_t with_bits(int64_t bits, const Run& run) {
  switch (bits) {
    case 2:
      return run(std::integral_constant<int, 2>());
    case 3:
      return run(std::integral_constant<int, 3>());
    case 4:
      return run(std::integral_constant<int, 4>());
    case 5:
      return run(std::integral_constant<int, 5>());
    case 6:
      return run(std::integral_constant<int, 6>());
    case 7:
      return run(std::integral_constant<int, 7>());
    default:
      return run(std::integral_constant<int, 8>());
  }
}

// The blocks of a kernel for tiles of shape S, and its shared memory where that is more than a kernel has unasked.
template <typename S, typename Kernel>
cudaError_t ready(Kernel kernel, int64_t tiles, int processors, unsigned& blocks) {
  blocks = static_cast<unsigned>(std::min<int64_t>(tiles, static_cast<int64_t>(processors) * S::kBlocks));
  if constexpr (S::kSharedBytes > 48 << 10) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  return cudaSuccess;
}

template <typename S, int kBits>
cudaError_t launch(const Operands& p, const Epilogue& e, int processors, cudaStream_t stream) {
  const int64_t tiles = tile_count<S>(p.rows, p.outputs);
  unsigned blocks = 0;
  const cudaError_t error = ready<S>(multiply_kernel<S, kBits>, tiles, processors, blocks);
  if (error != cudaSuccess) return error;
  multiply_kernel<S, kBits><<<blocks, S::kThreads, S::kSharedBytes, stream>>>(p, e, tiles);
  return cudaGetLastError();
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, asked for by its name, so that no library of it is linked; null where it has none.
Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

// The driver's description of bytes [rows, row_bytes] in tiles of S.
template <typename S>
cudaError_t describe(const uint8_t* data, int row_bytes, int rows, TensorMap& map) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap), "");
  static_assert(S::kM == S::kN && S::kDepth == 128, "one box for both operands, as wide as its swizzle");
  static const Encode encode = find_encode();  // once, and not at every launch
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[] = {S::kDepth, S::kM}, steps[] = {1, 1};
  const CUresult encoded =
      encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<uint8_t*>(data), sizes,
             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return encoded == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

template <typename T>
cudaError_t launch_quantize_rows(const T* x, int64_t rows, int64_t columns, const Quantizer& quantizer, uint8_t* out,
                                 int64_t stride, cudaStream_t stream) {
  quantize_rows_kernel<T><<<std::min(blocks_for(rows), 1u << 16), kRowThreads, 0, stream>>>(
      x, static_cast<int>(rows), static_cast<int>(columns), quantizer, out, stride);
  return cudaGetLastError();
}

#define DFQVIT_INSTANTIATE(T)                                                                                \
  template cudaError_t launch_quantize_rows(const T*, int64_t, int64_t, const Quantizer&, uint8_t*, int64_t, \
                                            cudaStream_t);
DFQVIT_INSTANTIATE(float)
DFQVIT_INSTANTIATE(__half)
DFQVIT_INSTANTIATE(__nv_bfloat16)
#undef DFQVIT_INSTANTIATE

cudaError_t launch_unpack(const uint8_t* weight, int64_t bits, int64_t row_bytes, int64_t chunks, uint8_t* out,
                          cudaStream_t stream) {
  return with_bits(bits, [&](auto constant) {
    constexpr int kBits = decltype(constant)::value;
    if constexpr (kBits < 8) {
      const auto blocks = static_cast<unsigned>((chunks + kRowThreads - 1) / kRowThreads);
      unpack_kernel<kBits><<<blocks, kRowThreads, 0, stream>>>(weight, row_bytes, chunks, out);
      return cudaGetLastError();
    } else {
      return cudaErrorInvalidValue;
    }
  });
}

cudaError_t launch_sums(const Operands& operands, int64_t bits, int32_t* sums, cudaStream_t stream) {
  sums_kernel<<<blocks_for(operands.outputs), kRowThreads, 0, stream>>>(
      operands.b, operands.b_bytes, static_cast<int>(bits), operands.outputs, operands.depth, sums);
  return cudaGetLastError();
}

template <typename S>
cudaError_t launch_multiply(int64_t bits, const Operands& operands, const Epilogue& epilogue, int processors,
                            cudaStream_t stream) {
  return with_bits(bits, [&](auto constant) {
    return launch<S, decltype(constant)::value>(operands, epilogue, processors, stream);
  });
}

cudaError_t launch_multiply_tiles(const Operands& p, const Epilogue& e, int processors, cudaStream_t stream) {
  using S = GroupOfTiles;
  TensorMap a, b;
  cudaError_t error = describe<S>(p.a, p.a_bytes, p.rows, a);
  if (error != cudaSuccess) return error;
  error = describe<S>(p.b, p.b_bytes, p.outputs, b);
  if (error != cudaSuccess) return error;
  const int64_t tiles = tile_count<S>(p.rows, p.outputs);
  unsigned blocks = 0;
  error = ready<S>(multiply_tiles_kernel<S>, tiles, processors, blocks);
  if (error != cudaSuccess) return error;
  multiply_tiles_kernel<S><<<blocks, S::kThreads, S::kSharedBytes, stream>>>(a, b, p, e, tiles);
  return cudaGetLastError();
}

template cudaError_t launch_multiply<Small>(int64_t, const Operands&, const Epilogue&, int, cudaStream_t);
template cudaError_t launch_multiply<Large>(int64_t, const Operands&, const Epilogue&, int, cudaStream_t);
template cudaError_t launch_multiply<Group>(int64_t, const Operands&, const Epilogue&, int, cudaStream_t);

}  // namespace tile
}  // namespace quant
}  // namespace dfqvit
