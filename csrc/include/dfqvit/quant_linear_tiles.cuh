// The CUDA kernel of quant_linear for Hopper and weights of 8 bits, its operands brought by copies of whole tiles: what
// quant_linear.cuh does with the instructions of every thread, one thread here asks for. Everything else is shared.
#pragma once

#include "dfqvit/quant_linear_epilogue.cuh"
#include "dfqvit/quant_linear_launch.h"
#include "dfqvit/quant_linear_product.cuh"
#include "dfqvit/quant_linear_tma.cuh"

namespace dfqvit {
namespace quant {
namespace tile {

// Asks for one step of a tile.
template <typename S>
__device__ __forceinline__ void fetch_tiles(const TensorMap& a, const TensorMap& b, Place origin, int step,
                                            uint32_t stage, uint32_t barrier) {
  expect_bytes(barrier, S::kStageBytes);
  copy_tile(stage, &a, step * S::kDepth, origin.row, barrier);
  copy_tile(stage + S::kM * S::kDepth, &b, step * S::kDepth, origin.column, barrier);
}

template <typename S>
__device__ __forceinline__ void multiply_copied_tiles(const TensorMap& a, const TensorMap& b, const Operands& p,
                                                      const Epilogue& e, int64_t tiles, uint8_t* memory) {
  const uint32_t stages = shared_address(memory), barriers = stages + S::kStagesBytes;
  const int steps = (p.depth + S::kDepth - 1) / S::kDepth;
  const bool asks = threadIdx.x == 0;
  if (asks) {
    for (int i = 0; i < kStages; ++i) make_barrier(barriers + 8 * i);
    show_barriers();
  }
  // The same in all lanes, which the compiler cannot see by itself.
  const uint32_t first_row = __shfl_sync(0xffffffffu, threadIdx.x / kGroup, 0) * kGroupM;
  const uint64_t first_a = operand_descriptor(stages + first_row * S::kDepth);
  const uint64_t first_b = operand_descriptor(stages + S::kM * S::kDepth);
  uint32_t stage = 0, parity = 0;  // of the step that is multiplied; stages follow each other from tile to tile
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Place origin = tile_origin<S>(tile, p.outputs);
    int32_t sum[S::kCountM][S::kCountN][4] = {};
    // The panels of the tile before were ordinary memory; the copies see it another way.
    show_to_async_proxy();
    __syncthreads();
    if (asks) {
      uint32_t to = stage;
#pragma unroll 1
      for (int step = 0; step < kStages && step < steps; ++step) {
        fetch_tiles<S>(a, b, origin, step, stages + to * S::kStageBytes, barriers + 8 * to);
        to = to + 1 < kStages ? to + 1 : 0;
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      wait_for_bytes(barriers + 8 * stage, parity);
      start_group<S>(first_a + stage * (S::kStageBytes / 16), first_b + stage * (S::kStageBytes / 16), sum);
      group_wait_for_older();
      __syncthreads();  // all are done with the step before: its stage is free
      if (asks && step > 0 && step - 1 + kStages < steps) {
        const uint32_t to = stage > 0 ? stage - 1 : kStages - 1;
        fetch_tiles<S>(a, b, origin, step - 1 + kStages, stages + to * S::kStageBytes, barriers + 8 * to);
      }
      __syncwarp();
      stage = stage + 1 < kStages ? stage + 1 : 0;
      parity ^= stage == 0;
    }
    group_wait(sum[0]);
    __syncthreads();  // the stages become panels
    finish<S>(sum, p.rows, p.outputs, e, origin, reinterpret_cast<int32_t*>(memory));
  }
}

// `a` and `b` are p's arrays.
template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    multiply_tiles_kernel(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, const Operands p,
                          const Epilogue e, int64_t tiles) {
  extern __shared__ __align__(1024) uint8_t memory[];
  // Elsewhere the kernel is empty, and never launched.
  if constexpr (kHasWgmma) multiply_copied_tiles<S>(a, b, p, e, tiles, memory);
}

}  // namespace tile
}  // namespace quant
}  // namespace dfqvit
