// The CUDA kernels of patch_similarity_entropy, on raw pointers. No torch headers.
//
// A block of 256 threads owns 64 rows of one set (an image, or a window of one) and walks the tiles of 64 columns; a
// tile of similarities lives in shared memory only. float32 tiles are products of float32, fused multiply-adds: with a
// bandwidth of 0.01 an error in a similarity comes back a hundredfold, and tensor cores (3xTF32 too: they truncate as
// they accumulate) cannot keep the entropy within 1e-5. bfloat16 and float16 tiles run on the tensor cores. Every sum
// has a fixed order, and there are no atomics on numbers: results are the same on every run.
#pragma once

#include <mma.h>

#include "dfqvit/device_floats.cuh"
#include "dfqvit/patch_similarity_entropy.h"
#include "dfqvit/patch_similarity_entropy_launch.h"

namespace dfqvit {
namespace entropy {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
static_assert(kWarps == kRowsOfBlock, "");
constexpr int kBlocksPerSm = 2;         // at least: 128 registers a thread
constexpr int kDepth = 32;              // depth of an operand chunk
constexpr int kPitch = kTile + 4;       // floats in a row of a tile in shared memory
constexpr int kHalfPitch = kDepth + 8;  // half-width values in a row of an operand of the tensor cores
constexpr int kTileFloats = kTile * kPitch;
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

// inverse and diagonal of every row; one warp a row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    normalise_kernel(const T* __restrict__ x, float* __restrict__ inverse, float* __restrict__ diagonal, int64_t rows,
                     int64_t depth) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  double squares = 0.0;
  for (int64_t d = lane; d < depth; d += 32) {
    const double value = to_float(x[row * depth + d]);
    squares += value * value;
  }
  for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  if (lane == 0) {
    const double norm = sqrt(squares);
    const double inv = 1.0 / (norm < kNormFloor ? kNormFloor : norm);
    inverse[row] = static_cast<float>(inv);
    diagonal[row] = norm >= kNormFloor && isfinite(norm) ? 1.0f : static_cast<float>(squares * inv * inv);
  }
}

// The unit vectors of kTile rows from row0 on, columns [d0, d0 + width), into to[...]: transposed, to[d][row], for the
// products that make similarities; as they are, to[row][d], for the products with slopes. Zero outside the set.
template <bool kTransposed, int kWidth, typename T>
__device__ __forceinline__ void load_units(const Sets<T>& sets, int64_t set, int64_t row0, int64_t d0, float* to) {
  for (int i = threadIdx.x; i < kTile * kWidth; i += kThreads) {
    const int r = i / kWidth, d = i % kWidth;
    const int64_t row = row0 + r;
    float value = 0.0f;
    if (row < sets.n && d0 + d < sets.depth) {
      const int64_t global = set * sets.n + row;
      value = to_float(sets.x[global * sets.depth + d0 + d]) * sets.inverse[global];
    }
    to[kTransposed ? d * kPitch + r : r * kPitch + d] = value;
  }
}

// What a cell of a tile holds, given the similarity.
__device__ __forceinline__ float cell(float similarity, int64_t row, int64_t column, int64_t n) {
  return row < n && column < n && row != column ? similarity : kNoPair;
}

// s [kTile, kPitch] = the similarities of rows from row0 on with columns from column0 on. `operands` is room for one
// tile. Begins and ends with a barrier.
__device__ __forceinline__ void similarity_tile(const Sets<float>& sets, int64_t set, int64_t row0, int64_t column0,
                                                float* operands, float* s) {
  float* a = operands;
  float* b = operands + kDepth * kPitch;
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  float sum[4][4] = {};
  for (int64_t d0 = 0; d0 < sets.depth; d0 += kDepth) {
    __syncthreads();
    load_units<true, kDepth>(sets, set, row0, d0, a);
    load_units<true, kDepth>(sets, set, column0, d0, b);
    __syncthreads();
    float part[4][4] = {};  // of this chunk: short sums round less
#pragma unroll 8
    for (int d = 0; d < kDepth; ++d) {
      const float4 av = *reinterpret_cast<const float4*>(a + d * kPitch + 4 * ty);
      const float4 bv = *reinterpret_cast<const float4*>(b + d * kPitch + 4 * tx);
      const float ar[4] = {av.x, av.y, av.z, av.w}, br[4] = {bv.x, bv.y, bv.z, bv.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) part[i][j] = fmaf(ar[i], br[j], part[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += part[i][j];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int r = 4 * ty + i, c = 4 * tx + j;
      s[r * kPitch + c] = cell(sum[i][j], row0 + r, column0 + c, sets.n);
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
  const int warp = threadIdx.x / 32;
  const int row_block = warp / 2, column_block = (warp % 2) * 2;  // a warp makes 16 x 32 of the tile
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum[2];
  wmma::fill_fragment(sum[0], 0.0f);
  wmma::fill_fragment(sum[1], 0.0f);
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
      wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> fa;
      wmma::load_matrix_sync(fa, a + row_block * 16 * kHalfPitch + k, kHalfPitch);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> fb;
        wmma::load_matrix_sync(fb, b + (column_block + j) * 16 * kHalfPitch + k, kHalfPitch);
        wmma::mma_sync(sum[j], fa, fb, sum[j]);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    wmma::store_matrix_sync(s + row_block * 16 * kPitch + (column_block + j) * 16, sum[j], kPitch, wmma::mem_row_major);
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

// The 16 cells of a tile that a thread works on: 8 rows a warp, 2 columns a lane.
__device__ __forceinline__ float* own_cell(float* s, int i) {
  return s + (threadIdx.x / 32 * 8 + i / 2) * kPitch + threadIdx.x % 32 + (i % 2) * 32;
}

// The places that matter to the cells of this warp.
__device__ __forceinline__ Span warp_span(const float (&s)[16], const Places& places, float inverse_step) {
  float low = kNoPair, high = -kNoPair;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    low = fminf(low, s[i]);
    high = fmaxf(high, s[i] < kNoPair ? s[i] : -kNoPair);
  }
  low = warp_min(low);
  high = warp_max(high);
  return low > high ? Span{0, 0} : places.span(low, high, inverse_step);
}

// ends [sets * tiles, 2]: the least and greatest similarity of the pairs of each block, the diagonal included.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) range_kernel(Sets<T> sets, float* __restrict__ ends) {
  extern __shared__ __align__(128) float shared[];
  float* operands = shared;
  float* s = shared + kTileFloats;
  DFQVIT_BLOCK_SHARED float warp_low[kWarps], warp_high[kWarps];
  const int64_t tiles = sets.tiles(), set = blockIdx.x / tiles, panel = blockIdx.x % tiles;
  float low = kNoPair, high = -kNoPair;
  for (int64_t tile = panel; tile < tiles; ++tile) {
    similarity_tile(sets, set, panel * kTile, tile * kTile, operands, s);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float value = *own_cell(s, i);
      low = fminf(low, value);
      high = fmaxf(high, value < kNoPair ? value : -kNoPair);
    }
  }
  const int64_t row = panel * kTile + threadIdx.x;
  if (threadIdx.x < kTile && row < sets.n) {
    const float value = sets.diagonal[set * sets.n + row];
    low = fminf(low, value);
    high = fmaxf(high, value);
  }
  low = warp_min(low);
  high = warp_max(high);
  if (threadIdx.x % 32 == 0) {
    warp_low[threadIdx.x / 32] = low;
    warp_high[threadIdx.x / 32] = high;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) {
      low = fminf(low, warp_low[w]);
      high = fmaxf(high, warp_high[w]);
    }
    ends[2 * static_cast<int64_t>(blockIdx.x)] = low;
    ends[2 * static_cast<int64_t>(blockIdx.x) + 1] = high;
  }
}

// value_range [layers, 2] from `parts` pairs of ends a layer; one block of one warp a layer.
__global__ void finish_range_kernel(const float* __restrict__ ends, int64_t parts, float* __restrict__ value_range) {
  const float* from = ends + 2 * parts * blockIdx.x;
  float low = kNoPair, high = -kNoPair;
  for (int64_t i = threadIdx.x; i < parts; i += 32) {
    low = fminf(low, from[2 * i]);
    high = fmaxf(high, from[2 * i + 1]);
  }
  low = fminf(fmaxf(warp_min(low), -1.0f), 1.0f);
  high = fminf(fmaxf(warp_max(high), -1.0f), 1.0f);
  if (threadIdx.x == 0) {
    value_range[2 * blockIdx.x] = static_cast<double>(high) - low <= kFlatWidth ? high : low;
    value_range[2 * blockIdx.x + 1] = high;
  }
}

// parts [sets * tiles, points]: for each block, the Gaussians around each place of its ordered pairs of distinct
// vectors with the other one in the block's tile or a later one. `batch` sets share a range.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    density_kernel(Sets<T> sets, const float* __restrict__ value_range, int64_t batch, int points, float bandwidth,
                   double* __restrict__ parts) {
  extern __shared__ __align__(128) float shared[];
  float* operands = shared;
  float* s = shared + kTileFloats;
  double* sums = reinterpret_cast<double*>(shared + 2 * kTileFloats);  // [kWarps, points], a row for each warp
  const int64_t tiles = sets.tiles(), set = blockIdx.x / tiles, panel = blockIdx.x % tiles;
  const int64_t layer = set / batch;
  const Places places{value_range[2 * layer], value_range[2 * layer + 1], points, bandwidth};
  const float inverse_step = places.inverse_step(), scale = places.exponent_scale();
  double* own = sums + threadIdx.x / 32 * points;
  for (int j = threadIdx.x; j < kWarps * points; j += kThreads) sums[j] = 0.0;
  for (int64_t tile = panel; tile < tiles; ++tile) {
    similarity_tile(sets, set, panel * kTile, tile * kTile, operands, s);  // its barriers also order the zeros above
    float v[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] = *own_cell(s, i);
    const Span span = warp_span(v, places, inverse_step);
    for (int j = span.begin; j < span.end; ++j) {
      const float x = places.place(j);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float d = v[i] - x;
        sum += exp2f(d * d * scale);
      }
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0) own[j] += tile == panel ? sum : 2.0 * sum;
    }
  }
  __syncthreads();
  for (int j = threadIdx.x; j < points; j += kThreads) {
    double sum = 0.0;
    for (int w = 0; w < kWarps; ++w) sum += sums[w * points + j];
    parts[static_cast<int64_t>(blockIdx.x) * points + j] = sum;
  }
}

// density [images, points] and entropy [images] from the parts of an image's windows and its diagonal; a block an
// image.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    finish_density_kernel(const double* __restrict__ parts, const float* __restrict__ diagonal,
                          const float* __restrict__ value_range, int64_t n, int64_t tiles, int64_t windows,
                          int64_t images_per_layer, int points, float bandwidth, float* __restrict__ density,
                          T* __restrict__ entropy) {
  DFQVIT_BLOCK_SHARED double terms[kMaxPoints];
  DFQVIT_BLOCK_SHARED int others;
  const int64_t image = blockIdx.x, layer = image / images_per_layer, rows = windows * n;
  const Places places{value_range[2 * layer], value_range[2 * layer + 1], points, bandwidth};
  const float* own_diagonal = diagonal + image * rows;
  if (threadIdx.x == 0) others = 0;
  __syncthreads();
  for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
    if (own_diagonal[row] != 1.0f) others = 1;  // the same value from whoever writes
  }
  __syncthreads();
  for (int j = threadIdx.x; j < points; j += kThreads) {
    const double x = places.place(j), h = bandwidth;
    double sum = 0.0;
    for (int64_t part = image * windows * tiles; part < (image + 1) * windows * tiles; ++part) {
      sum += parts[part * points + j];
    }
    if (others == 0) {
      sum += static_cast<double>(rows) * exp(-0.5 * ((1.0 - x) / h) * ((1.0 - x) / h));
    } else {
      for (int64_t row = 0; row < rows; ++row) {
        const double z = (own_diagonal[row] - x) / h;
        sum += exp(-0.5 * z * z);
      }
    }
    const double p = smoothed_density(sum, static_cast<double>(n) * rows, h);
    density[image * points + j] = static_cast<float>(p);
    terms[j] = entropy_term(places, j, p);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0.0;
    for (int j = 0; j < points; ++j) sum += terms[j];
    from_float(static_cast<float>(sum), entropy + image);
  }
}

// target[r * pitch + d] += slopes [kTile, kTile] x units [kTile, 64], of this thread's 4 x 4 cells, rows below `rows`
// and columns below `columns` only. No barriers.
__device__ __forceinline__ void add_product(const float* slopes, const float* units, float* target, int64_t pitch,
                                            int64_t rows, int64_t columns) {
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  float sum[4][4] = {};
#pragma unroll 4
  for (int k = 0; k < kTile; k += 4) {
    float a[4][4], b[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 av = *reinterpret_cast<const float4*>(slopes + (4 * ty + i) * kPitch + k);
      const float4 bv = *reinterpret_cast<const float4*>(units + (k + i) * kPitch + 4 * tx);
      a[i][0] = av.x, a[i][1] = av.y, a[i][2] = av.z, a[i][3] = av.w;
      b[i][0] = bv.x, b[i][1] = bv.y, b[i][2] = bv.z, b[i][3] = bv.w;
    }
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(a[i][kk], b[kk][j], sum[i][j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int r = 4 * ty + i, d = 4 * tx + j;
      if (r < rows && d < columns) target[r * pitch + d] += sum[i][j];
    }
  }
}

// out [sets, n, depth] = the gradient of the vectors. The gradient of the unit vectors is summed in shared memory, or,
// for depth > kSharedGradDepth, in `room` [sets, n, depth] (unused otherwise): its rows belong to this block alone.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    backward_kernel(Sets<T> sets, const float* __restrict__ value_range, const float* __restrict__ density,
                    const float* __restrict__ grad, int64_t batch, int64_t windows, int points, float bandwidth,
                    float* __restrict__ room, T* __restrict__ out) {
  extern __shared__ __align__(128) float shared[];
  float* operands = shared;
  float* s = operands + kTileFloats;
  float* place = s + kTileFloats;
  float* factor = place + points;
  const int64_t tiles = sets.tiles(), set = blockIdx.x / tiles, panel = blockIdx.x % tiles;
  const int64_t layer = set / batch, image = set / windows, row0 = panel * kTile;
  const int64_t rows = sets.n - row0 < kTile ? sets.n - row0 : kTile;
  const bool in_shared = sets.depth <= kSharedGradDepth;
  float* unit_grad = in_shared ? factor + points : room + (set * sets.n + row0) * sets.depth;
  const Places places{value_range[2 * layer], value_range[2 * layer + 1], points, bandwidth};
  const float inverse_step = places.inverse_step(), scale = places.exponent_scale();
  for (int j = threadIdx.x; j < points; j += kThreads) {
    place[j] = places.place(j);
    factor[j] = static_cast<float>(slope_factor(places, j, density[image * points + j], grad[image],
                                                static_cast<double>(sets.n) * sets.n * windows));
  }
  for (int64_t i = threadIdx.x; i < rows * sets.depth; i += kThreads) unit_grad[i] = 0.0f;
  __syncthreads();

  for (int64_t tile = 0; tile < tiles; ++tile) {
    similarity_tile(sets, set, row0, tile * kTile, operands, s);
    float v[16], slope[16] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] = *own_cell(s, i);
    const Span span = warp_span(v, places, inverse_step);
    for (int j = span.begin; j < span.end; ++j) {
      const float x = place[j], f = factor[j];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float d = v[i] - x;
        slope[i] = fmaf(f, d * exp2f(d * d * scale), slope[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) *own_cell(s, i) = slope[i];
    for (int64_t d0 = 0; d0 < sets.depth; d0 += kTile) {
      __syncthreads();  // slopes written, and the operands' last readers done
      load_units<false, kTile>(sets, set, tile * kTile, d0, operands);
      __syncthreads();
      add_product(s, operands, unit_grad + d0, sets.depth, rows, sets.depth - d0);
    }
  }
  __syncthreads();

  // Back through x / max(|x|, kNormFloor), a warp a row; the diagonal matters to vectors shorter than the floor only.
  const int lane = threadIdx.x % 32;
  for (int64_t r = threadIdx.x / 32; r < rows; r += kWarps) {
    const int64_t row = set * sets.n + row0 + r;
    const float inverse = sets.inverse[row], on_diagonal = sets.diagonal[row];
    const T* x = sets.x + row * sets.depth;
    const float* du = unit_grad + r * sets.depth;
    float along = 0.0f;
    if (on_diagonal == 1.0f) {
      for (int64_t d = lane; d < sets.depth; d += 32) along = fmaf(to_float(x[d]) * inverse, du[d], along);
      along = warp_sum(along);
    } else {
      for (int j = 0; j < points; ++j) {
        const float d = on_diagonal - place[j];
        along = fmaf(-factor[j], d * exp2f(d * d * scale), along);
      }
    }
    for (int64_t d = lane; d < sets.depth; d += 32) {
      from_float((du[d] - to_float(x[d]) * inverse * along) * inverse, out + row * sets.depth + d);
    }
  }
}

// Bytes of dynamic shared memory of the kernels above.
inline int64_t range_shared_bytes() {
  return 2 * kTileFloats * sizeof(float);
}
inline int64_t density_shared_bytes(int64_t points) {
  return range_shared_bytes() + kWarps * points * sizeof(double);
}
inline int64_t backward_shared_bytes(int64_t points, int64_t depth) {
  const int64_t unit_grad = depth <= kSharedGradDepth ? kTile * depth : 0;
  return range_shared_bytes() + (2 * points + unit_grad) * sizeof(float);
}

}  // namespace cuda
}  // namespace entropy
}  // namespace dfqvit
