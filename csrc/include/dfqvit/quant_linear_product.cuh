// The exchangeable part of quant_linear's CUDA kernel: one step of a tile, multiplied. Either by mma.sync, where every
// warp loads its operands into registers, or by wgmma, where a warpgroup only names them in shared memory. The sums lie
// alike.
#pragma once

#include "dfqvit/quant_linear_ptx.cuh"
#include "dfqvit/quant_linear_tile.h"
#include "dfqvit/quant_linear_wgmma.cuh"

namespace dfqvit {
namespace quant {
namespace tile {

// One step of a warp: its part of the stage, multiplied by mma.sync. Done on return.
template <typename S>
__device__ __forceinline__ void multiply_by_warp(uint32_t stage, int32_t (&sum)[S::kCountM][S::kCountN][4]) {
  const int lane = threadIdx.x % 32;
  const Place warp = warp_origin<S>(threadIdx.x / 32), x = activation_address(lane), w = weight_address(lane);
  const uint32_t a_base = stage, b_base = a_base + S::kM * S::kDepth;
#pragma unroll
  for (int chunk = 0; chunk < S::kChunks; chunk += kMmaChunks) {
    uint32_t b[S::kCountN / 2][4];
#pragma unroll
    for (int j = 0; j < S::kCountN / 2; ++j) {
      load_matrices(b[j], b_base + shared_offset<S>(warp.column + j * 2 * kMmaN + w.row, chunk + w.column));
    }
#pragma unroll
    for (int i = 0; i < S::kCountM; ++i) {
      uint32_t a[4];
      load_matrices(a, a_base + shared_offset<S>(warp.row + i * kMmaM + x.row, chunk + x.column));
#pragma unroll
      for (int j = 0; j < S::kCountN; ++j) multiply_add(sum[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// One step of a warpgroup, started: in use from then on are `sum` and the stage, whose operands are named.
template <typename S>
__device__ __forceinline__ void start_group(uint64_t a, uint64_t b, int32_t (&sum)[S::kCountM][S::kCountN][4]) {
  group_fence();
#pragma unroll
  for (int chunk = 0; chunk < S::kChunks; chunk += kMmaChunks) group_multiply(sum[0], a + chunk, b + chunk);
  group_commit();
}
template <typename S>
__device__ __forceinline__ void start_group(uint32_t stage, int32_t (&sum)[S::kCountM][S::kCountN][4]) {
  const uint32_t first_row = threadIdx.x / kGroup * kGroupM;
  start_group<S>(operand_descriptor(stage + first_row * S::kDepth), operand_descriptor(stage + S::kM * S::kDepth), sum);
}

}  // namespace tile
}  // namespace quant
}  // namespace dfqvit
