// The CUDA kernels of patch_similarity_entropy, on raw pointers. No torch headers.
//
// A block of 64 threads makes a tile of 64 x 64 similarities of one set (an image, or a window of one), which lives in
// shared memory only; for the gradient it owns 64 rows and walks their tiles. float32 tiles are products of float32,
// fused multiply-adds: with a bandwidth of 0.01 an error in a similarity comes back a hundredfold, and tensor cores
// (3xTF32 too: they truncate as they accumulate) cannot keep the entropy within 1e-5. bfloat16 and float16 tiles run on
// the tensor cores. Every sum has a fixed order, and there are no atomics on numbers: results are the same on every
// run.
#pragma once

#include "dfqvit/patch_similarity_entropy_tile.cuh"
#include "dfqvit/quant_linear_ptx.cuh"

namespace dfqvit {
namespace entropy {
namespace cuda {

constexpr int kRowThreads = 32 * kRowsOfBlock;  // of a block that normalises, or finishes densities

// inverse and diagonal of every row; one warp a row.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    normalise_kernel(const T* __restrict__ x, float* __restrict__ inverse, float* __restrict__ diagonal, int64_t rows,
                     int64_t depth) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.x / 32;
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

// ends [sets * pairs, 2]: the least and greatest similarity of each pair of tiles, the diagonal included.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) range_kernel(Sets<T> sets, float* __restrict__ ends) {
  extern __shared__ __align__(128) float shared[];
  float* operands = shared;
  float* s = shared + kTileFloats;
  DFQVIT_BLOCK_SHARED float warp_low[kWarps], warp_high[kWarps];
  const auto pairs = static_cast<uint32_t>(sets.pairs()), set = blockIdx.x / pairs;
  const TilePair tile(blockIdx.x % pairs, static_cast<uint32_t>(sets.tiles()));
  float low = kNoPair, high = -kNoPair;
  similarity_tile(sets, set, tile.row * kTile, tile.column * kTile, operands, s);
  const int parts = sets.n - tile.column * kTile <= kHalf ? 1 : kParts;
  for (int part = 0; part < parts; ++part) {
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const float value = *own_cell(s, part, i);
      low = fminf(low, value);
      high = fmaxf(high, value < kNoPair ? value : -kNoPair);
    }
  }
  const int64_t row = tile.row * kTile + threadIdx.x;
  if (tile.row == tile.column && row < sets.n) {
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
static_assert(kThreads == kTile, "a thread for each row of the diagonal");

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

// The Gaussian of a distance, with Places::exponent_scale().
__device__ __forceinline__ float gaussian(float away, float scale) {
  return quant::tile::fast_exp2(away * away * scale);
}

// parts [sets * pairs, points]: for each pair of tiles, the Gaussians around each place of its ordered pairs of
// distinct vectors. `batch` sets share a range.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    density_kernel(Sets<T> sets, const float* __restrict__ value_range, int64_t batch, int points, float bandwidth,
                   double* __restrict__ parts) {
  extern __shared__ __align__(128) float shared[];
  float* operands = shared;
  float* s = shared + kTileFloats;
  double* sums = reinterpret_cast<double*>(shared);  // [kWarps, points], a row for each warp, in the operands' place
  const auto pairs = static_cast<uint32_t>(sets.pairs()), set = blockIdx.x / pairs;
  const uint32_t layer = set / static_cast<uint32_t>(batch);
  const TilePair tile(blockIdx.x % pairs, static_cast<uint32_t>(sets.tiles()));
  const Places places{value_range[2 * layer], value_range[2 * layer + 1], points, bandwidth};
  const float inverse_step = places.inverse_step(), scale = places.exponent_scale();
  const double weight = tile.row == tile.column ? 1.0 : 2.0;
  similarity_tile(sets, set, tile.row * kTile, tile.column * kTile, operands, s);
  double* own = sums + threadIdx.x / 32 * points;
  for (int j = threadIdx.x % 32; j < points; j += 32) own[j] = 0.0;
  __syncwarp();
  const int columns = sets.n - tile.column * kTile <= kHalf ? 1 : kParts;
#pragma unroll 1
  for (int part = 0; part < columns; ++part) {
    float v[kCells];
#pragma unroll
    for (int i = 0; i < kCells; ++i) v[i] = *own_cell(s, part, i);
    const Span span = warp_span(v, places, inverse_step);
#pragma unroll 1
    for (int j = span.begin; j < span.end; ++j) {
      const float x = places.place(j);
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < kCells; ++i) sum[i % 4] += gaussian(v[i] - x, scale);
      const float all = warp_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
      if (threadIdx.x % 32 == 0) own[j] += weight * all;
    }
  }
  __syncthreads();
  for (int j = threadIdx.x; j < points; j += kThreads) {
    double sum = 0.0;
    for (int w = 0; w < kWarps; ++w) sum += sums[w * points + j];
    parts[static_cast<int64_t>(blockIdx.x) * points + j] = sum;
  }
}
static_assert(kWarps * kMaxPoints * sizeof(double) <= kTileFloats * sizeof(float), "the sums fit");

// density [images, points] and entropy [images] from the parts of an image's windows and its diagonal; a block an
// image.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    finish_density_kernel(const double* __restrict__ parts, const float* __restrict__ diagonal,
                          const float* __restrict__ value_range, int64_t n, int64_t pairs, int64_t windows,
                          int64_t images_per_layer, int points, float bandwidth, float* __restrict__ density,
                          T* __restrict__ entropy) {
  DFQVIT_BLOCK_SHARED double terms[kMaxPoints];
  DFQVIT_BLOCK_SHARED int others;
  const int64_t image = blockIdx.x, layer = image / images_per_layer, rows = windows * n;
  const Places places{value_range[2 * layer], value_range[2 * layer + 1], points, bandwidth};
  const float* own_diagonal = diagonal + image * rows;
  if (threadIdx.x == 0) others = 0;
  __syncthreads();
  for (int64_t row = threadIdx.x; row < rows; row += kRowThreads) {
    if (own_diagonal[row] != 1.0f) others = 1;  // the same value from whoever writes
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int j = threadIdx.x / 32; j < points; j += kRowThreads / 32) {  // a warp a place
    const double x = places.place(j), h = bandwidth;
    double sum = 0.0;
    for (int64_t part = image * windows * pairs + lane; part < (image + 1) * windows * pairs; part += 32) {
      sum += parts[part * points + j];
    }
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (others == 0) {
      sum += static_cast<double>(rows) * exp(-0.5 * ((1.0 - x) / h) * ((1.0 - x) / h));
    } else {
      double ones = 0.0;
      for (int64_t row = lane; row < rows; row += 32) {
        const double z = (own_diagonal[row] - x) / h;
        ones += exp(-0.5 * z * z);
      }
      for (int offset = 16; offset > 0; offset /= 2) ones += __shfl_xor_sync(0xffffffffu, ones, offset);
      sum += ones;
    }
    if (lane == 0) {
      const double p = smoothed_density(sum, static_cast<double>(n) * rows, h);
      density[image * points + j] = static_cast<float>(p);
      terms[j] = entropy_term(places, j, p);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0.0;
    for (int j = 0; j < points; ++j) sum += terms[j];
    from_float(static_cast<float>(sum), entropy + image);
  }
}

// target[r * pitch + d] += slopes [kTile, kTile] x units [kTile, 64], of this thread's 8 x 8 cells, rows below `rows`
// and columns below `columns` only; `count`: rows of units that are not 0. No barriers.
__device__ __forceinline__ void add_product(const float* slopes, const float* units, float* target, int64_t pitch,
                                            int64_t rows, int64_t columns, int64_t count) {
  if (own_row() >= rows) return;
  float sum[8][8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int r = own_row() + i, d = own_column(j);
      sum[i][j] = r < rows && d < columns ? target[r * pitch + d] : 0.0f;
    }
  }
#pragma unroll 1
  for (int k = 0; k < kTile && k < count; k += 4) {
    float a[8][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 v = *reinterpret_cast<const float4*>(slopes + (own_row() + i) * kPitch + k);
      a[i][0] = v.x, a[i][1] = v.y, a[i][2] = v.z, a[i][3] = v.w;
    }
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      float b[8];
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const float4 v = *reinterpret_cast<const float4*>(units + (k + kk) * kPitch + own_column(j));
        b[j] = v.x, b[j + 1] = v.y, b[j + 2] = v.z, b[j + 3] = v.w;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] = fmaf(a[i][kk], b[j], sum[i][j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int r = own_row() + i, d = own_column(j);
      if (r < rows && d < columns) target[r * pitch + d] = sum[i][j];
    }
  }
}

// out [sets, n, depth] = the gradient of the vectors. The gradient of the unit vectors is summed in shared memory, or,
// for depth > kSharedGradDepth, in `room` [sets, n, depth] (unused otherwise): its rows belong to this block alone.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm / 2)
    backward_kernel(Sets<T> sets, const float* __restrict__ value_range, const float* __restrict__ density,
                    const float* __restrict__ grad, int64_t batch, int64_t windows, int points, float bandwidth,
                    float* __restrict__ room, T* __restrict__ out) {
  extern __shared__ __align__(128) float shared[];
  float* operands = shared;
  float* s = operands + kTileFloats;
  float* place = s + kTileFloats;
  float* factor = place + points;
  const auto tiles = static_cast<uint32_t>(sets.tiles()), set = blockIdx.x / tiles, panel = blockIdx.x % tiles;
  const uint32_t layer = set / static_cast<uint32_t>(batch), image = set / static_cast<uint32_t>(windows);
  const int64_t row0 = static_cast<int64_t>(panel) * kTile;
  const int64_t rows = sets.n - row0 < kTile ? sets.n - row0 : kTile;
  const bool in_shared = sets.depth <= kSharedGradDepth;
  float* unit_grad = in_shared ? factor + points : room + (static_cast<int64_t>(set) * sets.n + row0) * sets.depth;
  const Places places{value_range[2 * layer], value_range[2 * layer + 1], points, bandwidth};
  const float inverse_step = places.inverse_step(), scale = places.exponent_scale();
  for (int j = threadIdx.x; j < points; j += kThreads) {
    place[j] = places.place(j);
    factor[j] = static_cast<float>(slope_factor(places, j, density[int64_t{image} * points + j], grad[image],
                                                static_cast<double>(sets.n) * sets.n * windows));
  }
  for (int64_t i = threadIdx.x; i < rows * sets.depth; i += kThreads) unit_grad[i] = 0.0f;
  __syncthreads();

  for (uint32_t tile = 0; tile < tiles; ++tile) {
    similarity_tile(sets, set, row0, int64_t{tile} * kTile, operands, s);
    const int64_t count = sets.n - int64_t{tile} * kTile;
    const int columns = count <= kHalf ? 1 : kParts;  // slopes of no pair are 0
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      float v[kCells], slope[kCells] = {};
      if (part < columns) {
#pragma unroll
        for (int i = 0; i < kCells; ++i) v[i] = *own_cell(s, part, i);
        const Span span = warp_span(v, places, inverse_step);
#pragma unroll 1
        for (int j = span.begin; j < span.end; ++j) {
          const float x = place[j], f = factor[j];
#pragma unroll
          for (int i = 0; i < kCells; ++i) {
            const float away = v[i] - x;
            slope[i] = fmaf(f, away * gaussian(away, scale), slope[i]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kCells; ++i) *own_cell(s, part, i) = slope[i];
    }
    for (int64_t d0 = 0; d0 < sets.depth; d0 += kTile) {
      __syncthreads();  // slopes written, and the operands' last readers done
      load_units<false, kTile>(sets, set, int64_t{tile} * kTile, d0, operands);
      __syncthreads();
      add_product(s, operands, unit_grad + d0, sets.depth, rows, sets.depth - d0, count);
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
        along = fmaf(-factor[j], d * gaussian(d, scale), along);
      }
    }
    for (int64_t d = lane; d < sets.depth; d += 32) {
      from_float((du[d] - to_float(x[d]) * inverse * along) * inverse, out + row * sets.depth + d);
    }
  }
}

// Bytes of dynamic shared memory of the kernels above.
inline int64_t tile_shared_bytes() {
  return 2 * kTileFloats * sizeof(float);
}
inline int64_t backward_shared_bytes(int64_t points, int64_t depth) {
  const int64_t unit_grad = depth <= kSharedGradDepth ? kTile * depth : 0;
  return tile_shared_bytes() + (2 * points + unit_grad) * sizeof(float);
}

}  // namespace cuda
}  // namespace entropy
}  // namespace dfqvit
