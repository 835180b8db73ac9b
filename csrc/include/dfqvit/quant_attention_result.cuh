// What quant_attention.cuh makes of the totals of a query: bytes, or floats. No torch headers.
#pragma once

#include "dfqvit/quant_attention_launch.h"
#include "dfqvit/quant_attention_ptx.cuh"
#include "dfqvit/quant_linear_tile.h"

namespace dfqvit {
namespace quant {
namespace attention {

using tile::kRounder;

__device__ __forceinline__ uint32_t lowest_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// y = v_scale * (total / sum of the steps - v_zero), to a byte. A product with an inverse stands for both divisions
// unless it is so near the middle of two integers that they may be rounded otherwise.
struct ToByte {
  float v_scale, out_scale, zero, greatest;
  float v_zero;
  float share, start;  // of the greatest: what an inverse is multiplied by, and what a total of 0 becomes
  float limit;         // a greater distance from an integer is too near the middle

  __device__ __forceinline__ explicit ToByte(const Heads& p)
      : v_scale(p.in_scale[2]),
        out_scale(p.out_scale ? *p.out_scale : 1.0f),
        zero(p.out_zero ? *p.out_zero : 0.0f),
        greatest(p.out_greatest),
        v_zero(p.in_zero[2]) {}
  // What follows from these.
  __device__ __forceinline__ void prepare() {
    const float below = v_zero * (v_scale / out_scale);
    share = v_scale / greatest;
    start = (zero - below) / greatest;
    // Of results in [0, 255], in units of the last place of 1: 3 (below + 256) that the product may be wrong by, 2
    // below
    // + 256 the start, 64 what is kept in [0, 1], and 512 the divisions themselves.
    const bool divisible = out_scale >= tile::kLeastStep && out_scale <= tile::kGreatestStep;
    limit = divisible ? 0.5f - 0x1p-23f * (5.0f * below + 1600.0f) : -1.0f;
  }
  __device__ __forceinline__ float whole(int32_t total, int32_t steps) const {
    return static_cast<float>(total - steps * static_cast<int32_t>(v_zero));
  }

  // kCount totals of one query to bytes in the low bits.
  template <int kCount>
  __device__ __forceinline__ void operator()(const int32_t (&total)[kCount], int32_t steps,
                                             uint32_t (&q)[kCount]) const {
    const float sum = static_cast<float>(steps), inverse = share * tile::fast_reciprocal(sum * out_scale);
    float away[kCount], furthest = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float part = saturated_multiply_add(static_cast<float>(total[i]), inverse, start);
      const float rounded = fmaf(part, greatest, kRounder);
      q[i] = static_cast<uint32_t>(tile::float_bits(rounded));
      away[i] = fabsf(fmaf(part, greatest, kRounder - rounded));
      furthest = fmaxf(furthest, away[i]);
    }
    if (furthest <= limit) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (away[i] <= limit) continue;
      const float y = v_scale * whole(total[i], steps) / sum;
      q[i] = static_cast<uint32_t>(fminf(fmaxf(nearbyintf(y / out_scale) + zero, 0.0f), greatest));
    }
  }
};

// The 16 x kDepth totals of a warp to memory. Tiles 2 c and 2 c + 1 are the even and odd channels of chunk c, so a lane
// has four neighbouring ones of each chunk. `offset`: of this head's first channel at token 0 of the image.
template <int kDepth>
__device__ __forceinline__ void write(const int32_t (&total)[kDepth / 8][4], const int32_t (&steps)[4], const Heads& p,
                                      const ToByte& to_byte, int64_t offset, const uint32_t (&token)[2], int row) {
  constexpr int kChunks = kDepth / 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= p.tokens) continue;
    const int64_t at = offset + token[half] * static_cast<uint32_t>(p.heads * p.depth) + threadIdx.x % 4 * 4;
    int32_t own[4 * kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) own[4 * c + i] = total[2 * c + i % 2][2 * half + i / 2];
    }
    if (p.out_scale) {
      uint32_t q[4 * kChunks];
      to_byte(own, steps[2 * half], q);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (16 * c >= p.depth) continue;
        *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(p.out) + at + 16 * c) =
            lowest_bytes(q[4 * c], q[4 * c + 1], q[4 * c + 2], q[4 * c + 3]);
      }
    } else {
      const float sum = static_cast<float>(steps[2 * half]);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (16 * c >= p.depth) continue;
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i] = to_byte.v_scale * to_byte.whole(own[4 * c + i], steps[2 * half]) / sum;
        *reinterpret_cast<float4*>(static_cast<float*>(p.out) + at + 16 * c) = {y[0], y[1], y[2], y[3]};
      }
    }
  }
}

}  // namespace attention
}  // namespace quant
}  // namespace dfqvit
