// The epilogue of the CUDA kernel of quant_linear: from a warp's sums in registers to the result in memory. What models
// do (`Kind`) has a loop of its own, with few instructions; everything else takes the general one.
#pragma once

#include "dfqvit/device_floats.cuh"
#include "dfqvit/quant_linear_launch.h"
#include "dfqvit/quant_linear_ptx.cuh"
#include "dfqvit/quant_linear_tile.h"

namespace dfqvit {
namespace quant {
namespace tile {

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

// What an output's sum is multiplied with, and what is taken from it before: the zero point's share.
__device__ __forceinline__ float scale_of(const Epilogue& e, int n) {
  return *e.x_scale * e.w_scale[n];
}
__device__ __forceinline__ int32_t offset_of(const Epilogue& e, int n) {
  return static_cast<int32_t>(*e.x_zero) * e.w_sums[n];
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
      scale[i] = there ? scale_of(e, n + i) : 0.0f;
      offset[i] = there ? offset_of(e, n + i) : 0;
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

// What belongs to four neighbouring outputs where the result is bytes. Integers come from floats by adding kRounder,
// which leaves no room for a fraction, so the sum is rounded half to even, and its bits count up by one from those of
// kRounder: `start` is the zero point less those.
struct ByteColumns {
  float scale[4], bias[4], inverse[4];
  int32_t offset[4], start[4];

  __device__ __forceinline__ ByteColumns(const Epilogue& e, int n, int outputs) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool there = n + i < outputs;
      scale[i] = there ? scale_of(e, n + i) : 0.0f;
      offset[i] = there ? offset_of(e, n + i) : 0;
      bias[i] = there && e.bias ? e.bias[n + i] : 0.0f;
      const float step = there ? e.out_scale[n + i] : 1.0f;
      inverse[i] = 1.0f / step;
      start[i] = (there ? static_cast<int32_t>(e.out_zero[n + i]) : 0) - kRounderBits;
    }
  }
};

// Whether one of four scales is so small or so large that only a division is exact.
__device__ __forceinline__ bool only_divisible(const Epilogue& e, int n, int outputs) {
  bool found = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float step = n + i < outputs ? e.out_scale[n + i] : 1.0f;
    found |= !(step >= kLeastStep && step <= kGreatestStep);
  }
  return found;
}

// See kGelu. For results that are rounded to bytes.
__device__ __forceinline__ float gelu_by_sigmoid(float y, const float (&c)[5]) {
  const float square = fminf(y * y, kGeluLimit);
  float p = c[4];
#pragma unroll
  for (int i = 3; i >= 0; --i) p = fmaf(p, square, c[i]);
  return y * fast_reciprocal(1.0f + fast_exp2(y * p));
}

// Four sums to four bytes. False where a quotient is so near the middle of two integers that its product with the
// inverse may be rounded otherwise (as simd_convert.h has it for the CPU): they differ by less than 2^-13 where they
// are below 512, and beyond both are clamped. After GELU there is no such check: what a product is off by is far less
// than what GELU may be off by. `y` is what is to be rounded.
template <bool kGelu>
__device__ __forceinline__ bool to_bytes(const int32_t (&sum)[4], const ByteColumns& c, const Epilogue& e,
                                         float (&y)[4], uint32_t& bytes) {
  int32_t q[4];
  float far = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float whole = static_cast<float>(sum[i] - c.offset[i]);
    if constexpr (kGelu) {
      y[i] = gelu_by_sigmoid(fmaf(c.scale[i], whole, c.bias[i]), e.gelu);
      q[i] = float_bits(fmaf(y[i], c.inverse[i], kRounder)) + c.start[i];
    } else {
      y[i] = c.scale[i] * whole + c.bias[i];
      const float ratio = fmaxf(y[i] * c.inverse[i], -kFarBelow);
      const float rounded = ratio + kRounder;
      far = fmaxf(far, fabsf(ratio - (rounded - kRounder)));
      q[i] = float_bits(rounded) + c.start[i];
    }
  }
  bytes = pack_bytes(q);
  return far <= 0.5f - 0x1p-12f;
}

// The rows of a panel that a lane has, to bytes.
template <typename S, bool kGelu>
struct ToBytes {
  const Epilogue& e;
  ByteColumns columns;
  int n, outputs;
  uint8_t* to;

  __device__ __forceinline__ ToBytes(const Epilogue& e, int row, int n, int outputs)
      : e(e),
        columns(e, n, outputs),
        n(n),
        outputs(outputs),
        to(static_cast<uint8_t*>(e.out) + static_cast<int64_t>(row) * outputs + n) {}

  // Rows that are not there are computed too, from whatever the sums hold, and not written: a branch would cost more.
  __device__ __forceinline__ void operator()(const int32_t (&sum)[4], int, bool there) const {
    float y[4];
    uint32_t bytes;
    const bool sure = to_bytes<kGelu>(sum, columns, e, y, bytes);
    if (!kGelu && !sure && there) {
      int32_t q[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // seldom
        q[i] = static_cast<int32_t>(quantized(y[i], e.out_scale[n + i], e.out_zero[n + i], 0.0f, 255.0f));
      }
      bytes = pack_bytes(q);
    }
    if (there) *reinterpret_cast<uint32_t*>(to) = bytes;
  }
  __device__ __forceinline__ void next() { to += S::kRowsTogether * static_cast<int64_t>(outputs); }
};

// The same, to float32.
template <typename S>
struct ToFloats {
  const Epilogue& e;
  float scale[4], bias[4];
  int32_t offset[4];
  int outputs, token;
  int64_t index;
  const float* acm;  // of the columns, at token 0

  __device__ __forceinline__ ToFloats(const Epilogue& e, int row, int n, int outputs)
      : e(e),
        outputs(outputs),
        token(e.acm ? row % e.tokens : 0),
        index(static_cast<int64_t>(row) * outputs + n),
        acm(e.acm + n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool there = n + i < outputs;
      scale[i] = there ? scale_of(e, n + i) : 0.0f;
      offset[i] = there ? offset_of(e, n + i) : 0;
      bias[i] = there && e.bias ? e.bias[n + i] : 0.0f;
    }
  }
  __device__ __forceinline__ void operator()(const int32_t (&sum)[4], int, bool there) const {
    if (!there) return;
    Four<float> y, addend{{bias[0], bias[1], bias[2], bias[3]}};
    if (e.acm) {
      const auto more = *reinterpret_cast<const Four<float>*>(acm + static_cast<int64_t>(token) * outputs);
#pragma unroll
      for (int i = 0; i < 4; ++i) addend.value[i] += more.value[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) y.value[i] = dequantized(sum[i], offset[i], scale[i]) + addend.value[i];
    if (e.residual) {
      const auto more = *reinterpret_cast<const Four<float>*>(static_cast<const float*>(e.residual) + index);
#pragma unroll
      for (int i = 0; i < 4; ++i) y.value[i] += more.value[i];
    }
    *reinterpret_cast<Four<float>*>(static_cast<float*>(e.out) + index) = y;
  }
  __device__ __forceinline__ void next() {
    index += S::kRowsTogether * static_cast<int64_t>(outputs);
    token = token_below(token, S::kRowsTogether, e.tokens);
  }
};

// The general one.
template <typename S>
struct ToAnything {
  const Epilogue& e;
  Columns columns;
  int outputs, token;

  __device__ __forceinline__ ToAnything(const Epilogue& e, int row, int n, int outputs)
      : e(e), columns(e, n, outputs), outputs(outputs), token(e.acm ? row % e.tokens : 0) {}
  __device__ __forceinline__ void operator()(const int32_t (&sum)[4], int row, bool there) const {
    if (there) finish(sum, columns, e, token, row, outputs);
  }
  __device__ __forceinline__ void next() { token = token_below(token, S::kRowsTogether, e.tokens); }
};

// The sums of a warp, to the result, 16 rows after the other.
// They are destroyed: the rows move up through the registers, so that the code of the epilogue stands here once and not
// once for each of their places.
template <typename S, typename To>
__device__ __forceinline__ void finish_by(int32_t (&sum)[S::kCountM][S::kCountN][4], int rows, int outputs,
                                          const Epilogue& e, Place origin, int32_t* panels) {
  const int lane = threadIdx.x % 32, warp_index = threadIdx.x / 32;
  const Place warp = warp_origin<S>(warp_index), mine = finished<S>(lane);
  int32_t* panel = panels + warp_index * (S::kPanelBytes / 4);
  const int n = origin.column + warp.column + mine.column;
  int row = origin.row + warp.row + mine.row;
  To to(e, row, n, outputs);
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
#pragma unroll 2
    for (int below = 0; below < kMmaM; below += S::kRowsTogether) {
      const int4 four = *reinterpret_cast<const int4*>(panel + (mine.row + below) * S::kPanelPitch + mine.column);
      const int32_t sums[4] = {four.x, four.y, four.z, four.w};
      to(sums, row, row < rows && n < outputs);
      row += S::kRowsTogether;
      to.next();
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

template <typename S>
__device__ __forceinline__ void finish(int32_t (&sum)[S::kCountM][S::kCountN][4], int rows, int outputs,
                                       const Epilogue& e, Place origin, int32_t* panels) {
  Kind kind = e.kind;
  if (kind == Kind::bytes || kind == Kind::gelu_bytes) {
    const int first = origin.column + warp_origin<S>(threadIdx.x / 32).column + finished<S>(threadIdx.x % 32).column;
    if (__any_sync(0xffffffffu, only_divisible(e, first, outputs))) kind = Kind::general;
  }
  if (kind == Kind::bytes) {
    finish_by<S, ToBytes<S, false>>(sum, rows, outputs, e, origin, panels);
  } else if (kind == Kind::gelu_bytes) {
    finish_by<S, ToBytes<S, true>>(sum, rows, outputs, e, origin, panels);
  } else if (kind == Kind::floats) {
    finish_by<S, ToFloats<S>>(sum, rows, outputs, e, origin, panels);
  } else {
    finish_by<S, ToAnything<S>>(sum, rows, outputs, e, origin, panels);
  }
}

}  // namespace tile
}  // namespace quant
}  // namespace dfqvit
