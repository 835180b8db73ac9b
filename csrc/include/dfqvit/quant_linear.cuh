// The CUDA kernels of quant_linear, on raw pointers; the index arithmetic is in quant_linear_tile.h. No torch headers.
//
//   quantize_rows_kernel   floats to integers in aligned rows
//   columns_kernel         scale and offset of each output
//   multiply_kernel        the product and its epilogue: tensor cores (mma.sync, u8 x s8, from sm_80), 3 stages of
//                          asynchronous copies, blocks that stay and take tile after tile
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dfqvit/quant_linear_ptx.cuh"
#include "dfqvit/quant_linear_tile.h"

namespace dfqvit {
namespace quant {
namespace tile {

constexpr int kRowThreads = 256;  // of the small kernels: 8 warps, each on a row
constexpr int kRowsAtOnce = kRowThreads / 32;

__device__ __forceinline__ float to_float(float v) {
  return v;
}
__device__ __forceinline__ float to_float(__half v) {
  return __half2float(v);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}

__device__ __forceinline__ void from_float(float v, float* out) {
  *out = v;
}
__device__ __forceinline__ void from_float(float v, __half* out) {
  *out = __float2half_rn(v);
}
__device__ __forceinline__ void from_float(float v, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(v);
}
__device__ __forceinline__ void from_float(float v, uint8_t* out) {
  *out = static_cast<uint8_t>(static_cast<int>(v));
}

// How floats become integers: row r has scale[r * step].
struct Quantizer {
  const float* scale;
  int step;
  const float* zero;  // null for 0
  float least, greatest;
};

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

// scale[n] = x_scale * w_scale[n] and offset[n] = x_zero * sum_k qw[n, k]. A warp takes an output.
static __global__ void __launch_bounds__(kRowThreads)
    columns_kernel(const uint8_t* __restrict__ weight, int64_t row_bytes, int bits, int outputs, int depth,
                   const float* __restrict__ x_scale, const float* __restrict__ x_zero,
                   const float* __restrict__ w_scale, float* __restrict__ scale, int32_t* __restrict__ offset) {
  const int n = blockIdx.x * kRowsAtOnce + threadIdx.x / 32;
  if (n >= outputs) return;
  const uint8_t* row = weight + n * row_bytes;
  int32_t sum = 0;
  for (int k = threadIdx.x % 32; k < depth; k += 32) sum += unpacked_at(row, k, bits);
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % 32 == 0) {
    scale[n] = *x_scale * w_scale[n];
    offset[n] = static_cast<int32_t>(*x_zero) * sum;
  }
}

// a [rows, depth] in rows of a_bytes, with zeros beyond depth; b [outputs, depth] packed, in rows of b_bytes. Whole
// chunks only: a_bytes is a multiple of 16, b_bytes of 2 * bits, and both start at multiples of 16. Weights beyond
// depth may be anything: they meet zeros.
struct Operands {
  const uint8_t* a;
  int a_bytes;
  const uint8_t* b;
  int b_bytes;
  int rows, outputs, depth;
};

struct Epilogue {
  const float* scale;
  const int32_t* offset;
  const float* bias;  // [outputs] or null
  const float* acm;   // [tokens, outputs] or null
  int tokens;
  Activation activation;
  const void* residual;  // [rows, outputs] of residual_type, or null
  Type residual_type;
  const float* out_scale;  // [outputs], for Type::u8 only
  const float* out_zero;
  float out_greatest;
  void* out;  // [rows, outputs]
  Type type;
  bool whole;  // outputs is a multiple of 4, and acm, residual and out start at multiples of 16
};

// A thread's part of one tile's way through K. `stage` is the address of a stage in shared memory.
template <typename S, int kBits>
struct Walk {
  static constexpr int kRowsApart = S::kThreads / kChunks;  // between the chunks of a thread
  static constexpr int kChunkBytes = 2 * kBits;             // of weights, packed

  const uint8_t *a, *b;         // this thread's first chunks at step 0
  int64_t a_apart, b_apart;     // bytes from one of its chunks to the next
  int a_rows, b_rows;           // rows from its first one to the end of a and b
  int a_left, b_left;           // bytes from its first chunk to the end of the row
  int place;                    // of the first chunk, in an array of a stage
  Packed waiting[S::kCopiesB];  // weights on their way through registers

  __device__ __forceinline__ Walk(const Operands& p, Place origin) {
    const Place at = copied(threadIdx.x, 0, S::kThreads);
    const int row = origin.row + at.row, n = origin.column + at.row;
    a = p.a + static_cast<int64_t>(row) * p.a_bytes + at.column * kChunk;
    b = p.b + static_cast<int64_t>(n) * p.b_bytes + at.column * kChunkBytes;
    a_apart = static_cast<int64_t>(kRowsApart) * p.a_bytes, b_apart = static_cast<int64_t>(kRowsApart) * p.b_bytes;
    a_rows = p.rows - row, b_rows = p.outputs - n;
    a_left = p.a_bytes - at.column * kChunk, b_left = p.b_bytes - at.column * kChunkBytes;
    place = shared_offset(at.row, at.column);
  }

  // Starts on the next step. 8-bit weights go straight to shared memory; others to registers, from where
  // `store_weights` unpacks them. The places of a thread's chunks are whole swizzles apart.
  __device__ __forceinline__ void fetch(uint32_t stage) {
    static_assert(kRowsApart % (2 * kChunks) == 0, "the chunks of a thread are placed alike");
#pragma unroll
    for (int i = 0; i < S::kCopiesA; ++i) {
      copy_async(stage + place + i * kRowsApart * kDepth, a + i * a_apart, i * kRowsApart < a_rows && a_left > 0);
    }
#pragma unroll
    for (int i = 0; i < S::kCopiesB; ++i) {
      const bool there = i * kRowsApart < b_rows && b_left > 0;
      if constexpr (kBits == 8) {
        copy_async(stage + S::kM * kDepth + place + i * kRowsApart * kDepth, b + i * b_apart, there);
      } else {
        waiting[i] = there ? load_packed<kBits>(b + i * b_apart) : Packed{0, 0};
      }
    }
    a += kDepth, a_left -= kDepth;
    b += kChunks * kChunkBytes, b_left -= kChunks * kChunkBytes;
  }
  __device__ __forceinline__ void store_weights(uint32_t stage) {
    if constexpr (kBits < 8) {
#pragma unroll
      for (int i = 0; i < S::kCopiesB; ++i) {
        store_chunk(stage + S::kM * kDepth + place + i * kRowsApart * kDepth, unpack<kBits>(waiting[i]).word);
      }
    }
  }
};

// One step of a warp: its part of the stage, multiplied.
template <typename S>
__device__ __forceinline__ void multiply(uint32_t stage, int32_t (&sum)[S::kCountM][S::kCountN][4]) {
  const int lane = threadIdx.x % 32;
  const Place warp = warp_origin<S>(threadIdx.x / 32), x = activation_address(lane), w = weight_address(lane);
  const uint32_t a_base = stage, b_base = a_base + S::kM * kDepth;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; chunk += kMmaChunks) {
    uint32_t b[S::kCountN / 2][4];
#pragma unroll
    for (int j = 0; j < S::kCountN / 2; ++j) {
      load_matrices(b[j], b_base + shared_offset(warp.column + j * 2 * kMmaN + w.row, chunk + w.column));
    }
#pragma unroll
    for (int i = 0; i < S::kCountM; ++i) {
      uint32_t a[4];
      load_matrices(a, a_base + shared_offset(warp.row + i * kMmaM + x.row, chunk + x.column));
#pragma unroll
      for (int j = 0; j < S::kCountN; ++j) multiply_add(sum[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// Four neighbouring values at `index`, of which `count` are there.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};
template <typename T>
__device__ __forceinline__ Four<float> load_four(const void* base, int64_t index, bool whole, int count) {
  const T* from = static_cast<const T*>(base) + index;
  Four<T> four{};
  if (whole) {
    four = *reinterpret_cast<const Four<T>*>(from);
  } else {
    for (int i = 0; i < 4; ++i) {
      if (i < count) four.value[i] = from[i];
    }
  }
  Four<float> result;
  for (int i = 0; i < 4; ++i) result.value[i] = to_float(four.value[i]);
  return result;
}
template <typename T>
__device__ __forceinline__ void store_four(void* base, int64_t index, const Four<float>& y, bool whole, int count) {
  T* to = static_cast<T*>(base) + index;
  Four<T> four;
  for (int i = 0; i < 4; ++i) from_float(y.value[i], &four.value[i]);
  if (whole) {
    *reinterpret_cast<Four<T>*>(to) = four;
  } else {
    for (int i = 0; i < 4; ++i) {
      if (i < count) to[i] = four.value[i];
    }
  }
}

// What belongs to four neighbouring outputs; `count` of them are there.
struct Columns {
  int n, count;
  float scale[4], bias[4], out_scale[4], out_zero[4];
  int32_t offset[4];

  __device__ __forceinline__ Columns(const Epilogue& e, int first, int outputs) : n(first), count(outputs - first) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool there = i < count;
      scale[i] = there ? e.scale[n + i] : 0.0f;
      offset[i] = there ? e.offset[n + i] : 0;
      bias[i] = there && e.bias ? e.bias[n + i] : 0.0f;
      out_scale[i] = there && e.out_scale ? e.out_scale[n + i] : 1.0f;
      out_zero[i] = there && e.out_zero ? e.out_zero[n + i] : 0.0f;
    }
  }
};

// The epilogue of four sums of one row.
__device__ __forceinline__ void finish(const int32_t (&sum)[4], const Columns& c, const Epilogue& e, int token,
                                       int64_t row, int outputs) {
  const int64_t index = row * outputs + c.n;
  Four<float> y, addend;
#pragma unroll
  for (int i = 0; i < 4; ++i) addend.value[i] = c.bias[i];
  if (e.acm) {
    const int64_t at = static_cast<int64_t>(token) * outputs + c.n;
    const Four<float> acm = load_four<float>(e.acm, at, e.whole, c.count);
#pragma unroll
    for (int i = 0; i < 4; ++i) addend.value[i] += acm.value[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) y.value[i] = dequantized(sum[i], c.offset[i], c.scale[i]) + addend.value[i];
  if (e.activation != Activation::none) {
#pragma unroll
    for (int i = 0; i < 4; ++i) y.value[i] = activated(y.value[i], e.activation);
  }
  if (e.residual) {
    const Four<float> residual = e.residual_type == Type::f32 ? load_four<float>(e.residual, index, e.whole, c.count)
                                 : e.residual_type == Type::bf16
                                     ? load_four<__nv_bfloat16>(e.residual, index, e.whole, c.count)
                                     : load_four<__half>(e.residual, index, e.whole, c.count);
#pragma unroll
    for (int i = 0; i < 4; ++i) y.value[i] += residual.value[i];
  }
  if (e.type == Type::u8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y.value[i] = quantized(y.value[i], c.out_scale[i], c.out_zero[i], 0.0f, e.out_greatest);
    }
    store_four<uint8_t>(e.out, index, y, e.whole, c.count);
  } else if (e.type == Type::f32) {
    store_four<float>(e.out, index, y, e.whole, c.count);
  } else if (e.type == Type::bf16) {
    store_four<__nv_bfloat16>(e.out, index, y, e.whole, c.count);
  } else {
    store_four<__half>(e.out, index, y, e.whole, c.count);
  }
}

// The sums of a warp, to the result, 16 rows after the other. They are destroyed: the rows move up through the
// registers, so that the code of the epilogue stands here once and not once for each of their places.
template <typename S>
__device__ __forceinline__ void finish(int32_t (&sum)[S::kCountM][S::kCountN][4], const Operands& p, const Epilogue& e,
                                       Place origin, int32_t* panels) {
  const int lane = threadIdx.x % 32, warp_index = threadIdx.x / 32;
  const Place warp = warp_origin<S>(warp_index), mine = finished<S>(lane);
  int32_t* panel = panels + warp_index * (S::kPanelBytes / 4);
  const Columns columns(e, origin.column + warp.column + mine.column, p.outputs);
  int row = origin.row + warp.row + mine.row, token = e.acm ? row % e.tokens : 0;
#pragma unroll 1
  for (int i = 0; i < S::kCountM; ++i) {
#pragma unroll
    for (int j = 0; j < S::kCountN; ++j) {
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        const Place at = summed(lane, half);
        *reinterpret_cast<int2*>(panel + at.row * S::kPanelPitch + j * kMmaN + at.column) =
            make_int2(sum[0][j][half], sum[0][j][half + 1]);
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int below = 0; below < kMmaM; below += S::kRowsTogether) {
      const int4 four = *reinterpret_cast<const int4*>(panel + (mine.row + below) * S::kPanelPitch + mine.column);
      const int32_t sums[4] = {four.x, four.y, four.z, four.w};
      if (row < p.rows && columns.count > 0) finish(sums, columns, e, token, row, p.outputs);
      row += S::kRowsTogether;
      token = token_below(token, S::kRowsTogether, e.tokens);
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k + 1 < S::kCountM; ++k) {
#pragma unroll
      for (int j = 0; j < S::kCountN; ++j) {
#pragma unroll
        for (int l = 0; l < 4; ++l) sum[k][j][l] = sum[k + 1][j][l];
      }
    }
  }
}

template <typename S, int kBits>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    multiply_kernel(const Operands p, const Epilogue e, int64_t tiles) {
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t begin = shared_address(memory), end = begin + S::kSharedBytes;
  const int steps = (p.depth + kDepth - 1) / kDepth;
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
      __syncthreads();  // this step is in shared memory for all; the stage of the last one is free
      const bool more = step + kStages - 1 < steps;
      if (more) walk.fetch(writing);
      commit_copies();
      multiply<S>(reading, sum);
      if (more) walk.store_weights(writing);
      reading = reading + S::kStageBytes < end ? reading + S::kStageBytes : begin;
      writing = writing + S::kStageBytes < end ? writing + S::kStageBytes : begin;
    }
    __syncthreads();  // the stages become panels
    finish<S>(sum, p, e, origin, reinterpret_cast<int32_t*>(memory));
  }
}

}  // namespace tile
}  // namespace quant
}  // namespace dfqvit
