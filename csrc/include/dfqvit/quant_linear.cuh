// The CUDA kernels of quant_linear, on raw pointers; the index arithmetic is in quant_linear_tile.h. No torch headers.
//
//   quantize_rows_kernel   floats to integers in aligned rows
//   sums_kernel            sums of the weight's rows, where the caller has none
//   multiply_kernel        the product (quant_linear_product.cuh: tensor cores, u8 x s8) and its epilogue
//                          (quant_linear_epilogue.cuh); 3 stages of asynchronous copies, blocks that stay and take tile
//                          after tile
#pragma once

#include "dfqvit/quant_linear_epilogue.cuh"
#include "dfqvit/quant_linear_launch.h"
#include "dfqvit/quant_linear_product.cuh"
#include "dfqvit/quant_linear_ptx.cuh"
#include "dfqvit/quant_linear_tile.h"

namespace dfqvit {
namespace quant {
namespace tile {

constexpr int kRowThreads = 256;  // of the small kernels: 8 warps, each on a row
constexpr int kRowsAtOnce = kRowThreads / 32;

// x [rows, columns] to out [rows, stride], with zeros from `columns` on. A warp takes a row.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    quantize_rows_kernel(const T* __restrict__ x, int rows, int columns, Quantizer q, uint8_t* __restrict__ out,
                         int64_t stride) {
  struct alignas(4 * sizeof(T)) Four {
    T value[4];
  };
  const int lane = threadIdx.x % 32;
  const bool whole = columns % 4 == 0 && reinterpret_cast<uintptr_t>(x) % sizeof(Four) == 0;
  const float zero = q.zero ? *q.zero : 0.0f;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsAtOnce + threadIdx.x / 32; row < rows;
       row += static_cast<int64_t>(gridDim.x) * kRowsAtOnce) {
    const T* source = x + row * columns;
    const float scale = q.scale[row * q.step];
    for (int64_t k = 4 * lane; k < stride; k += 4 * 32) {
      Four four{};
      if (whole && k < columns) {
        four = *reinterpret_cast<const Four*>(source + k);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (k + i < columns) four.value[i] = source[k + i];
        }
      }
      uchar4 bytes;
      uint8_t* byte = reinterpret_cast<uint8_t*>(&bytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float v = quantized(to_float(four.value[i]), scale, zero, q.least, q.greatest);
        byte[i] = k + i < columns ? static_cast<uint8_t>(static_cast<int>(v)) : 0;
      }
      *reinterpret_cast<uchar4*>(out + row * stride + k) = bytes;
    }
  }
}

// sums[n] = sum_k qw[n, k]. A warp takes an output.
static __global__ void __launch_bounds__(kRowThreads)
    sums_kernel(const uint8_t* __restrict__ weight, int64_t row_bytes, int bits, int outputs, int depth,
                int32_t* __restrict__ sums) {
  const int n = blockIdx.x * kRowsAtOnce + threadIdx.x / 32;
  if (n >= outputs) return;
  const uint8_t* row = weight + n * row_bytes;
  int32_t sum = 0;
  for (int k = threadIdx.x % 32; k < depth; k += 32) sum += unpacked_at(row, k, bits);
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % 32 == 0) sums[n] = sum;
}

// Packed weights [outputs, row_bytes] to bytes [outputs, stride], a chunk of 16 a thread; row_bytes is a multiple of
// 2 * kBits, stride 16 times the chunks of a row. What lies beyond the weights is unpacked too: it meets zeros.
template <int kBits>
__global__ void __launch_bounds__(kRowThreads)
    unpack_kernel(const uint8_t* __restrict__ weight, int64_t row_bytes, int64_t chunks, uint8_t* __restrict__ out) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (chunk >= chunks) return;
  const int64_t across = row_bytes / (2 * kBits);
  const uint8_t* from = weight + chunk / across * row_bytes + chunk % across * (2 * kBits);
  *reinterpret_cast<Unpacked*>(out + chunk * kChunk) = unpack<kBits>(load_packed<kBits>(from));
}

// A thread's part of one tile's way through K. `stage` is the address of a stage in shared memory.
template <typename S, int kBits>
struct Walk {
  static constexpr int kRowsApart = S::kThreads / S::kChunks;  // between the chunks of a thread
  static constexpr int kChunkBytes = 2 * kBits;                // of weights, packed

  const uint8_t *a, *b;         // this thread's first chunks at step 0
  int64_t a_apart, b_apart;     // bytes from one of its chunks to the next
  int a_rows, b_rows;           // rows from its first one to the end of a and b
  int a_left, b_left;           // bytes from its first chunk to the end of the row
  int place;                    // of the first chunk, in an array of a stage
  Packed waiting[S::kCopiesB];  // weights on their way through registers

  __device__ __forceinline__ Walk(const Operands& p, Place origin) {
    const Place at = copied<S>(threadIdx.x, 0);
    const int row = origin.row + at.row, n = origin.column + at.row;
    a = p.a + static_cast<int64_t>(row) * p.a_bytes + at.column * kChunk;
    b = p.b + static_cast<int64_t>(n) * p.b_bytes + at.column * kChunkBytes;
    a_apart = static_cast<int64_t>(kRowsApart) * p.a_bytes, b_apart = static_cast<int64_t>(kRowsApart) * p.b_bytes;
    a_rows = p.rows - row, b_rows = p.outputs - n;
    a_left = p.a_bytes - at.column * kChunk, b_left = p.b_bytes - at.column * kChunkBytes;
    place = shared_offset<S>(at.row, at.column);
  }

  // Starts on the next step. 8-bit weights go straight to shared memory; others to registers, from where
  // `store_weights` unpacks them. The places of a thread's chunks are whole swizzles apart.
  __device__ __forceinline__ void fetch(uint32_t stage) {
    static_assert(kRowsApart % 8 == 0, "the chunks of a thread are placed alike");
#pragma unroll
    for (int i = 0; i < S::kCopiesA; ++i) {
      copy_async(stage + place + i * kRowsApart * S::kDepth, a + i * a_apart, i * kRowsApart < a_rows && a_left > 0);
    }
#pragma unroll
    for (int i = 0; i < S::kCopiesB; ++i) {
      const bool there = i * kRowsApart < b_rows && b_left > 0;
      if constexpr (kBits == 8) {
        copy_async(stage + S::kM * S::kDepth + place + i * kRowsApart * S::kDepth, b + i * b_apart, there);
      } else {
        waiting[i] = there ? load_packed<kBits>(b + i * b_apart) : Packed{0, 0};
      }
    }
    a += S::kDepth, a_left -= S::kDepth;
    b += S::kChunks * kChunkBytes, b_left -= S::kChunks * kChunkBytes;
  }
  __device__ __forceinline__ void store_weights(uint32_t stage) {
    if constexpr (kBits < 8) {
#pragma unroll
      for (int i = 0; i < S::kCopiesB; ++i) {
        store_chunk(stage + S::kM * S::kDepth + place + i * kRowsApart * S::kDepth, unpack<kBits>(waiting[i]).word);
      }
    }
  }
};

template <typename S, int kBits>
__device__ __forceinline__ void multiply_tiles(const Operands& p, const Epilogue& e, int64_t tiles, uint8_t* memory) {
  constexpr bool kGroups = S::kProduct == Product::wgmma;
  const uint32_t begin = shared_address(memory), end = begin + S::kStagesBytes;
  const int steps = (p.depth + S::kDepth - 1) / S::kDepth;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Place origin = tile_origin<S>(tile, p.outputs);
    Walk<S, kBits> walk(p, origin);
    int32_t sum[S::kCountM][S::kCountN][4] = {};
    uint32_t reading = begin, writing = begin;
    __syncthreads();  // all warps are done with the panels of the tile before
    // One group of copies a step, empty ones too, so that "all but the newest" always means the same step.
#pragma unroll 1
    for (int step = 0; step < kStages - 1; ++step, writing += S::kStageBytes) {
      if (step < steps) {
        walk.fetch(writing);
        walk.store_weights(writing);
      }
      commit_copies();
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<kStages - 2>();
      if constexpr (kGroups) show_to_async_proxy();
      __syncthreads();  // this step is in shared memory for all; the stage of the last one is free
      if constexpr (kGroups) start_group<S>(reading, sum);
      const bool more = step + kStages - 1 < steps;
      if (more) walk.fetch(writing);
      commit_copies();
      if constexpr (!kGroups) multiply_by_warp<S>(reading, sum);
      if (more) walk.store_weights(writing);
      if constexpr (kGroups) group_wait(sum[0]);
      reading = reading + S::kStageBytes < end ? reading + S::kStageBytes : begin;
      writing = writing + S::kStageBytes < end ? writing + S::kStageBytes : begin;
    }
    __syncthreads();  // the stages become panels
    finish<S>(sum, p.rows, p.outputs, e, origin, reinterpret_cast<int32_t*>(memory));
  }
}

template <typename S, int kBits>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    multiply_kernel(const Operands p, const Epilogue e, int64_t tiles) {
  extern __shared__ __align__(1024) uint8_t memory[];
  // Elsewhere the kernel is empty, and never launched.
  if constexpr (S::kProduct == Product::mma_sync || kHasWgmma) multiply_tiles<S, kBits>(p, e, tiles, memory);
}

}  // namespace tile
}  // namespace quant
}  // namespace dfqvit
