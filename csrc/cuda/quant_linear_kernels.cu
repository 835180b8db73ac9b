// Launches of the kernels in dfqvit/quant_linear.cuh. No torch headers.
#include <algorithm>

#include "dfqvit/quant_linear.cuh"

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

template <typename S, int kBits>
cudaError_t launch(const Operands& p, const Epilogue& e, int processors, cudaStream_t stream) {
  const auto kernel = multiply_kernel<S, kBits>;
  const int64_t tiles = tile_count<S>(p.rows, p.outputs);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, static_cast<int64_t>(processors) * S::kBlocks));
  if constexpr (S::kSharedBytes > 48 << 10) {  // more than a kernel has unasked
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
    if (error != cudaSuccess) return error;
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<blocks, S::kThreads, S::kSharedBytes, stream>>>(p, e, tiles);
  return cudaGetLastError();
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

cudaError_t launch_columns(const Operands& operands, int64_t bits, const int32_t* sums, const float* x_scale,
                           const float* x_zero, const float* w_scale, float* scale, int32_t* offset,
                           cudaStream_t stream) {
  columns_kernel<<<blocks_for(operands.outputs), kRowThreads, 0, stream>>>(
      operands.b, operands.b_bytes, static_cast<int>(bits), operands.outputs, operands.depth, sums, x_scale, x_zero,
      w_scale, scale, offset);
  return cudaGetLastError();
}

template <typename S>
cudaError_t launch_multiply(int64_t bits, const Operands& operands, const Epilogue& epilogue, int processors,
                            cudaStream_t stream) {
  return with_bits(bits, [&](auto constant) {
    return launch<S, decltype(constant)::value>(operands, epilogue, processors, stream);
  });
}

template cudaError_t launch_multiply<Small>(int64_t, const Operands&, const Epilogue&, int, cudaStream_t);
template cudaError_t launch_multiply<Large>(int64_t, const Operands&, const Epilogue&, int, cudaStream_t);
template cudaError_t launch_multiply<Group>(int64_t, const Operands&, const Epilogue&, int, cudaStream_t);

}  // namespace tile
}  // namespace quant
}  // namespace dfqvit
