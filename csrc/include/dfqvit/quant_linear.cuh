// The CUDA kernels of quant_linear, on raw pointers; the index arithmetic is in quant_linear_tile.h. No torch headers.
//
//   quantize_rows_kernel   floats (or bytes whose rows are not aligned) to integers in aligned rows
//   columns_kernel         scale and offset of each output
//   multiply_kernel        the product and its epilogue: tensor cores (mma.sync, u8 x s8, from sm_80), 3 stages of
//                          asynchronous copies, blocks that stay and take tile after tile
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

// How floats become integers: row r has scale[r * step].
struct Quantizer {
  const float* scale;
  int step;
  const float* zero;  // null for 0
  float least, greatest;
};

// x [rows, columns] to out [rows, stride], with zeros from `columns` on; bytes are only moved. A warp takes a row.
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
    const float scale = q.scale ? q.scale[row * q.step] : 1.0f;
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
        if constexpr (std::is_same_v<T, uint8_t>) {
          byte[i] = four.value[i];  // zero beyond the columns
        } else {
          const float v = quantized(to_float(four.value[i]), scale, zero, q.least, q.greatest);
          byte[i] = k + i < columns ? static_cast<uint8_t>(static_cast<int>(v)) : 0;
        }
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

// a [rows, depth] in rows of a_bytes, a multiple of 16, with zeros beyond depth; b [outputs, depth] packed, in rows of
// b_bytes. Both start at multiples of 16. Weights beyond depth may be anything: they meet zeros.
struct Operands {
  const uint8_t* a;
  int64_t a_bytes;
  const uint8_t* b;
  int64_t b_bytes;
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
  bool pairs;  // outputs is even, and acm, residual and out start at multiples of 8
};

// `bytes` (8 or 16) from global to shared memory, in the background; zeros unless `there`.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, bool there) {
  const int size = there ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(size) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global), "r"(size) : "memory");
  }
}
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void multiply_add(int32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One tile's way through K for one block.
template <typename S, int kBits>
struct Walk {
  const Operands& p;
  const Place origin;
  const uint32_t shared;
  Packed waiting[S::kCopiesB];  // weights on their way through registers

  __device__ __forceinline__ uint32_t stage(int step) const { return shared + step % kStages * S::kStageBytes; }

  __device__ __forceinline__ void copy_activations(int step) {
#pragma unroll
    for (int i = 0; i < S::kCopiesA; ++i) {
      const Place at = copied(threadIdx.x, i, S::kThreads);
      const int64_t row = origin.row + at.row, byte = static_cast<int64_t>(step) * kDepth + at.column * kChunk;
      const bool there = row < p.rows && byte < p.a_bytes;
      copy_async<16>(stage(step) + shared_offset(at.row, at.column), there ? p.a + row * p.a_bytes + byte : p.a, there);
    }
  }

  // 8-bit weights go straight to shared memory; others to registers, from where `store_weights` unpacks them.
  __device__ __forceinline__ void fetch_weights(int step) {
#pragma unroll
    for (int i = 0; i < S::kCopiesB; ++i) {
      const Place at = copied(threadIdx.x, i, S::kThreads);
      const int64_t n = origin.column + at.row, chunk = static_cast<int64_t>(step) * kChunks + at.column;
      const uint8_t* row = p.b + n * p.b_bytes;
      if constexpr (kBits == 8) {
        const int64_t byte = chunk * kChunk;
        const uint32_t to = stage(step) + S::kM * kDepth + shared_offset(at.row, at.column);
        if (p.b_bytes % 16 == 0) {
          const bool there = n < p.outputs && byte < p.b_bytes;
          copy_async<16>(to, there ? row + byte : p.b, there);
        } else {
#pragma unroll
          for (int half = 0; half < 16; half += 8) {
            const bool there = n < p.outputs && byte + half < p.b_bytes;
            copy_async<8>(to + half, there ? row + byte + half : p.b, there);
          }
        }
      } else {
        waiting[i] = n < p.outputs ? load_packed<kBits>(row, chunk, p.b_bytes) : Packed{0, 0};
      }
    }
  }
  __device__ __forceinline__ void store_weights(int step) {
    if constexpr (kBits < 8) {
#pragma unroll
      for (int i = 0; i < S::kCopiesB; ++i) {
        const Place at = copied(threadIdx.x, i, S::kThreads);
        const Unpacked u = unpack<kBits>(waiting[i]);
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(stage(step) + S::kM * kDepth +
                                                                      shared_offset(at.row, at.column)),
                     "r"(u.word[0]), "r"(u.word[1]), "r"(u.word[2]), "r"(u.word[3])
                     : "memory");
      }
    }
  }

  __device__ __forceinline__ void multiply(int step, int32_t (&sum)[S::kCountM][S::kCountN][4]) const {
    const int lane = threadIdx.x % 32;
    const Place warp = warp_origin<S>(threadIdx.x / 32), x = activation_address(lane), w = weight_address(lane);
    const uint32_t a_base = stage(step), b_base = a_base + S::kM * kDepth;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += kMmaChunks) {
      uint32_t a[S::kCountM][4], b[S::kCountN / 2][4];
#pragma unroll
      for (int i = 0; i < S::kCountM; ++i) {
        load_matrices(a[i], a_base + shared_offset(warp.row + i * kMmaM + x.row, chunk + x.column));
      }
#pragma unroll
      for (int j = 0; j < S::kCountN / 2; ++j) {
        load_matrices(b[j], b_base + shared_offset(warp.column + j * 2 * kMmaN + w.row, chunk + w.column));
      }
#pragma unroll
      for (int i = 0; i < S::kCountM; ++i) {
#pragma unroll
        for (int j = 0; j < S::kCountN; ++j)
          multiply_add(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
};

// Values 0 and 1 at `index`, of which the second may not be there. With `pair` they are read or written at once.
__device__ __forceinline__ float2 load_two(const void* base, Type type, int64_t index, bool pair, bool second) {
  if (type == Type::f32) {
    const float* p = static_cast<const float*>(base) + index;
    return pair ? *reinterpret_cast<const float2*>(p) : make_float2(p[0], second ? p[1] : 0.0f);
  }
  if (type == Type::bf16) {
    const __nv_bfloat16* p = static_cast<const __nv_bfloat16*>(base) + index;
    if (pair) return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(p));
    return make_float2(to_float(p[0]), second ? to_float(p[1]) : 0.0f);
  }
  const __half* p = static_cast<const __half*>(base) + index;
  if (pair) return __half22float2(*reinterpret_cast<const __half2*>(p));
  return make_float2(to_float(p[0]), second ? to_float(p[1]) : 0.0f);
}
template <typename Two, typename One>
__device__ __forceinline__ void store_two(void* base, int64_t index, Two two, One first, One other, bool pair,
                                          bool second) {
  One* p = static_cast<One*>(base) + index;
  if (pair) {
    *reinterpret_cast<Two*>(p) = two;
  } else {
    p[0] = first;
    if (second) p[1] = other;
  }
}
__device__ __forceinline__ void store_two(void* base, Type type, int64_t index, float2 v, bool pair, bool second) {
  if (type == Type::f32) {
    store_two<float2, float>(base, index, v, v.x, v.y, pair, second);
  } else if (type == Type::bf16) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(v.x, v.y);
    store_two<__nv_bfloat162, __nv_bfloat16>(base, index, two, two.x, two.y, pair, second);
  } else if (type == Type::f16) {
    const __half2 two = __floats2half2_rn(v.x, v.y);
    store_two<__half2, __half>(base, index, two, two.x, two.y, pair, second);
  } else {
    const uchar2 two =
        make_uchar2(static_cast<uint8_t>(static_cast<int>(v.x)), static_cast<uint8_t>(static_cast<int>(v.y)));
    store_two<uchar2, uint8_t>(base, index, two, two.x, two.y, pair, second);
  }
}

// What a thread holds, to the result.
template <typename S>
__device__ __forceinline__ void finish(const int32_t (&sum)[S::kCountM][S::kCountN][4], const Operands& p,
                                       const Epilogue& e, Place origin) {
  const int lane = threadIdx.x % 32;
  const Place warp = warp_origin<S>(threadIdx.x / 32), mine = summed(lane, 0);
  const int first_row = origin.row + warp.row + mine.row, first_column = origin.column + warp.column + mine.column;
  int token[2 * S::kCountM];  // of each row; found once, a division costs as much as an output's epilogue
#pragma unroll
  for (int i = 0; i < 2 * S::kCountM; ++i) token[i] = e.acm ? (first_row + i * 8) % e.tokens : 0;
#pragma unroll
  for (int j = 0; j < S::kCountN; ++j) {
    const int n = first_column + j * kMmaN;
    if (n >= p.outputs) continue;
    const bool second = n + 1 < p.outputs;
    const int m = second ? n + 1 : n;
    const float scale[2] = {e.scale[n], e.scale[m]};
    const int32_t offset[2] = {e.offset[n], e.offset[m]};
#pragma unroll
    for (int i = 0; i < 2 * S::kCountM; ++i) {
      const int row = first_row + i * 8;
      if (row >= p.rows) continue;
      const int64_t index = static_cast<int64_t>(row) * p.outputs + n;
      const int32_t* s = &sum[i / 2][j][i % 2 * 2];
      float2 y = make_float2(dequantized(s[0], offset[0], scale[0]), dequantized(s[1], offset[1], scale[1]));
      if (e.bias) y = make_float2(y.x + e.bias[n], y.y + e.bias[m]);
      if (e.acm) {
        const float2 acm = load_two(e.acm, Type::f32, static_cast<int64_t>(token[i]) * p.outputs + n, e.pairs, second);
        y = make_float2(y.x + acm.x, y.y + acm.y);
      }
      y = make_float2(activated(y.x, e.activation), activated(y.y, e.activation));
      if (e.residual) {
        const float2 residual = load_two(e.residual, e.residual_type, index, e.pairs, second);
        y = make_float2(y.x + residual.x, y.y + residual.y);
      }
      if (e.type == Type::u8) {
        y = make_float2(quantized(y.x, e.out_scale[n], e.out_zero[n], 0.0f, e.out_greatest),
                        quantized(y.y, e.out_scale[m], e.out_zero[m], 0.0f, e.out_greatest));
      }
      store_two(e.out, e.type, index, y, e.pairs, second);
    }
  }
}

template <typename S, int kBits>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    multiply_kernel(const Operands p, const Epilogue e, int64_t tiles) {
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  const int steps = (p.depth + kDepth - 1) / kDepth;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Place origin = tile_origin<S>(tile, p.outputs);
    Walk<S, kBits> walk{p, origin, shared, {}};
    int32_t sum[S::kCountM][S::kCountN][4] = {};
    __syncthreads();  // all warps are done with the stages of the tile before
    // One group of copies a step, empty ones too, so that "all but the newest" always means the same step.
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) {
        walk.copy_activations(step);
        walk.fetch_weights(step);
        walk.store_weights(step);
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
    }
    for (int step = 0; step < steps; ++step) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
      __syncthreads();  // this step is in shared memory for all; the stage of the last one is free
      const int ahead = step + kStages - 1;
      if (ahead < steps) {
        walk.copy_activations(ahead);
        walk.fetch_weights(ahead);
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
      walk.multiply(step, sum);
      if (ahead < steps) walk.store_weights(ahead);
    }
    finish<S>(sum, p, e, origin);
  }
}

}  // namespace tile
}  // namespace quant
}  // namespace dfqvit
