// The epilogue of the CUDA kernel of quant_linear: from a warp's sums in registers to the result in memory.
#pragma once

#include "dfqvit/device_floats.cuh"
#include "dfqvit/quant_linear_tile.h"

namespace dfqvit {
namespace quant {
namespace tile {

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
__device__ __forceinline__ void finish(int32_t (&sum)[S::kCountM][S::kCountN][4], int rows, int outputs,
                                       const Epilogue& e, Place origin, int32_t* panels) {
  const int lane = threadIdx.x % 32, warp_index = threadIdx.x / 32;
  const Place warp = warp_origin<S>(warp_index), mine = finished<S>(lane);
  int32_t* panel = panels + warp_index * (S::kPanelBytes / 4);
  const Columns columns(e, origin.column + warp.column + mine.column, outputs);
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
      if (row < rows && columns.count > 0) finish(sums, columns, e, token, row, outputs);
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

}  // namespace tile
}  // namespace quant
}  // namespace dfqvit
