// Tiles of similarities in shared memory, for the CUDA kernels of patch_similarity_entropy.cuh. No torch headers.
#pragma once

#include <mma.h>

#include <type_traits>

#include "dfqvit/device_floats.cuh"
#include "dfqvit/patch_similarity_entropy.h"
#include "dfqvit/patch_similarity_entropy_launch.h"

namespace dfqvit {
namespace entropy {
namespace cuda {

constexpr int kThreads = 64;  // of a block that makes tiles, each thread 8 x 8 of its cells
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 8;         // at least: 128 registers a thread
constexpr int kDepth = 32;              // depth of an operand chunk
constexpr int kHalf = kTile / 2;        // rows of a warp, and columns that are left out where the set has no more
constexpr int kPitch = kTile + 4;       // floats in a row of a tile in shared memory
constexpr int kHalfPitch = kDepth + 8;  // half-width values in a row of an operand of the tensor cores
constexpr int kTileFloats = kTile * kPitch;
constexpr int kLongest = 64;      // depth that is summed in registers: short sums round less
constexpr float kNoPair = 1e18f;  // in cells that are no pair of distinct vectors: its Gaussian is 0 at every bandwidth
static_assert(2 * kDepth * kPitch == kTileFloats, "the two operand chunks share the room of one tile");

__device__ __forceinline__ float warp_sum(float v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}
__device__ __forceinline__ float warp_min(float v) {
  for (int offset = 16; offset > 0; offset /= 2) v = fminf(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
  for (int offset = 16; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

// The unit vectors of kTile rows from row0 on, columns [d0, d0 + kWidth), into to[...]: transposed, to[d][row], for the
// products that make similarities; as they are, to[row][d], for the products with slopes. Zero outside the set. A
// thread takes a row, so that threads store neighbouring words of a transposed one; four values at once where rows are
// whole fours.
template <bool kTransposed, int kWidth, typename T>
__device__ __forceinline__ void load_units(const Sets<T>& sets, int64_t set, int64_t row0, int64_t d0, float* to) {
  static_assert(kThreads == kTile, "a thread a row");
  const int row = threadIdx.x, left = static_cast<int>(sets.n - row0), depth = static_cast<int>(sets.depth - d0);
  const int64_t global = set * sets.n + row0 + (row < left ? row : 0);
  const int width = row < left ? (depth < kWidth ? depth : kWidth) : 0;
  const float inverse = sets.inverse[global];
  const T* from = sets.x + global * sets.depth + d0;
  float* place = to + (kTransposed ? row : row * kPitch);
  constexpr int kNext = kTransposed ? kPitch : 1;
  if (std::is_same<T, float>::value && sets.depth % 4 == 0 && reinterpret_cast<uintptr_t>(sets.x) % 16 == 0) {
#pragma unroll 8
    for (int d = 0; d < kWidth; d += 4) {
      float4 v{0.0f, 0.0f, 0.0f, 0.0f};
      if (d < width) v = *reinterpret_cast<const float4*>(from + d);
      v.x *= inverse, v.y *= inverse, v.z *= inverse, v.w *= inverse;
      if constexpr (kTransposed) {
        place[d * kNext] = v.x, place[(d + 1) * kNext] = v.y, place[(d + 2) * kNext] = v.z,
                  place[(d + 3) * kNext] = v.w;
      } else {
        *reinterpret_cast<float4*>(place + d) = v;
      }
    }
  } else {
#pragma unroll 4
    for (int d = 0; d < kWidth; ++d) place[d * kNext] = d < width ? to_float(from[d]) * inverse : 0.0f;
  }
}

// What a cell of a tile holds, given the similarity.
__device__ __forceinline__ float cell(float similarity, int64_t row, int64_t column, int64_t n) {
  return row < n && column < n && row != column ? similarity : kNoPair;
}

// The 8 x 8 cells of a thread, in products of float32: rows 8 y to 8 y + 7, columns 4 x to 4 x + 3 and those kHalf on.
__device__ __forceinline__ int own_row() {
  return threadIdx.x / 8 * 8;
}
__device__ __forceinline__ int own_column(int j) {
  return threadIdx.x % 8 * 4 + j / 4 * kHalf + j % 4;
}

// sum += a^T b of this thread's rows and first kColumns columns: a and b as `load_units` transposes them.
template <int kColumns>
__device__ __forceinline__ void multiply_units(const float* a, const float* b, float (&sum)[8][8]) {
#pragma unroll 4
  for (int d = 0; d < kDepth; ++d) {
    float ar[8], br[kColumns];
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(a + d * kPitch + own_row() + i);
      ar[i] = v.x, ar[i + 1] = v.y, ar[i + 2] = v.z, ar[i + 3] = v.w;
    }
#pragma unroll
    for (int j = 0; j < kColumns; j += 4) {
      const float4 v = *reinterpret_cast<const float4*>(b + d * kPitch + own_column(j));
      br[j] = v.x, br[j + 1] = v.y, br[j + 2] = v.z, br[j + 3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[i][j] = fmaf(ar[i], br[j], sum[i][j]);
    }
  }
}

// s [kTile, kPitch] = the similarities of rows from row0 on with columns from column0 on. `operands` is room for one
// tile. Begins and ends with a barrier.
__device__ __forceinline__ void similarity_tile(const Sets<float>& sets, int64_t set, int64_t row0, int64_t column0,
                                                float* operands, float* s) {
  float* a = operands;
  float* b = operands + kDepth * kPitch;
  const bool narrow = sets.n - column0 <= kHalf;
  for (int64_t begin = 0; begin < sets.depth; begin += kLongest) {
    float sum[8][8] = {};
    for (int64_t d0 = begin; d0 < begin + kLongest && d0 < sets.depth; d0 += kDepth) {
      __syncthreads();
      load_units<true, kDepth>(sets, set, row0, d0, a);
      load_units<true, kDepth>(sets, set, column0, d0, b);
      __syncthreads();
      if (sets.n - row0 <= threadIdx.x / 32 * kHalf) continue;  // no rows of this warp
      if (narrow) {
        multiply_units<4>(a, b, sum);
      } else {
        multiply_units<8>(a, b, sum);
      }
    }
    const bool last = begin + kLongest >= sets.depth;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const int r = own_row() + i, c = own_column(j);
        float4* to = reinterpret_cast<float4*>(s + r * kPitch + c);
        float4 v{sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]};
        if (begin > 0) v.x += to->x, v.y += to->y, v.z += to->z, v.w += to->w;
        if (last) {
          v.x = cell(v.x, row0 + r, column0 + c, sets.n), v.y = cell(v.y, row0 + r, column0 + c + 1, sets.n);
          v.z = cell(v.z, row0 + r, column0 + c + 2, sets.n), v.w = cell(v.w, row0 + r, column0 + c + 3, sets.n);
        }
        *to = v;
      }
    }
  }
  __syncthreads();
}

// The same on the tensor cores: products of the vectors as they are, normalised afterwards in float32.
template <typename T>
__device__ __forceinline__ void similarity_tile(const Sets<T>& sets, int64_t set, int64_t row0, int64_t column0,
                                                float* operands, float* s) {
  namespace wmma = nvcuda::wmma;
  T* a = reinterpret_cast<T*>(operands);
  T* b = a + kTile * kHalfPitch;
  static_assert(2 * kTile * kHalfPitch * sizeof(T) <= kTileFloats * sizeof(float), "operands must fit");
  constexpr int kRowBlocks = kHalf / 16, kColumnBlocks = kTile / 16;  // of a warp
  const int first = threadIdx.x / 32 * kHalf;                         // its first row
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum[kRowBlocks][kColumnBlocks];
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) wmma::fill_fragment(sum[i][j], 0.0f);
  }
  for (int64_t d0 = 0; d0 < sets.depth; d0 += kDepth) {
    __syncthreads();
    for (int i = threadIdx.x; i < kTile * kDepth; i += kThreads) {
      const int r = i / kDepth, d = i % kDepth;
      const bool inside = d0 + d < sets.depth;
      T zero;
      from_float(0.0f, &zero);
      const T* from = sets.x + set * sets.n * sets.depth + d0 + d;
      a[r * kHalfPitch + d] = inside && row0 + r < sets.n ? from[(row0 + r) * sets.depth] : zero;
      b[r * kHalfPitch + d] = inside && column0 + r < sets.n ? from[(column0 + r) * sets.depth] : zero;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> fa[kRowBlocks];
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i) {
        wmma::load_matrix_sync(fa[i], a + (first + 16 * i) * kHalfPitch + k, kHalfPitch);
      }
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j) {
        wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> fb;
        wmma::load_matrix_sync(fb, b + 16 * j * kHalfPitch + k, kHalfPitch);
#pragma unroll
        for (int i = 0; i < kRowBlocks; ++i) wmma::mma_sync(sum[i][j], fa[i], fb, sum[i][j]);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRowBlocks; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
      wmma::store_matrix_sync(s + (first + 16 * i) * kPitch + 16 * j, sum[i][j], kPitch, wmma::mem_row_major);
    }
  }
  __syncthreads();
  const float* inverse = sets.inverse + set * sets.n;
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int r = i / kTile, c = i % kTile;
    const int64_t row = row0 + r, column = column0 + c;
    const float scale = row < sets.n && column < sets.n ? inverse[row] * inverse[column] : 0.0f;
    s[r * kPitch + c] = cell(s[r * kPitch + c] * scale, row, column, sets.n);
  }
  __syncthreads();
}

// The cells of a tile that a thread works on: the rows of its warp, 2 columns a lane, kCells of them at a time. In a
// tile where the set has no more than half of the columns, the other half is left out.
constexpr int kCells = 32;
constexpr int kParts = 2 * kHalf / kCells;  // of the cells of a thread
__device__ __forceinline__ float* own_cell(float* s, int part, int i) {
  return s + (threadIdx.x / 32 * kHalf + i) * kPitch + threadIdx.x % 32 + part * kHalf;
}
static_assert(kCells == kHalf && kParts == 2, "a part is one column");

// The places that matter to these cells of a warp.
__device__ __forceinline__ Span warp_span(const float (&s)[kCells], const Places& places, float inverse_step) {
  float low = kNoPair, high = -kNoPair;
#pragma unroll
  for (int i = 0; i < kCells; ++i) {
    low = fminf(low, s[i]);
    high = fmaxf(high, s[i] < kNoPair ? s[i] : -kNoPair);
  }
  low = warp_min(low);
  high = warp_max(high);
  return low > high ? Span{0, 0} : places.span(low, high, inverse_step);
}

// Of the pairs of tiles of a set, each once: the row `pair` of the triangle of tiles (0, 0), (0, 1), ... (1, 1), ...
struct TilePair {
  int64_t row, column;

  __device__ __forceinline__ TilePair(uint32_t pair, uint32_t tiles) {
    uint32_t first = 0;
    for (; pair >= tiles - first; ++first) pair -= tiles - first;
    row = first, column = first + pair;
  }
};

}  // namespace cuda
}  // namespace entropy
}  // namespace dfqvit
