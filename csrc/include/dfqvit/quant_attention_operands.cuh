// The operands of quant_attention.cuh: one head in shared memory, and the queries of a warp. No torch headers.
#pragma once

#include "dfqvit/quant_attention_ptx.cuh"
#include "dfqvit/quant_attention_result.cuh"

namespace dfqvit {
namespace quant {
namespace attention {

using tile::kRounderBits;

constexpr int kMostWarps = 7;  // of a block, two of which have all registers
constexpr int kRows = 16;      // queries of a warp at a time
constexpr int kStep = 32;      // keys of one product with the values
constexpr float kLog2E = 1.44269504f, kLog2Of255 = 7.99435344f;
constexpr float kLeastUnit = 1e-37f;     // of a score in the exponent: -infinity times it is not 0 times infinity
constexpr uint32_t kOnes = 0x01010101u;  // in each byte
constexpr int32_t kNoKey = -(1 << 30);   // the sums of keys that do not exist begin here: below every other
constexpr int32_t kNoKeyBits = static_cast<int32_t>(0xFF800000u);  // or here, minus infinity, where sums are bits

// Keys whose scores a warp keeps: the 197 tokens of a ViT, or a few runs.
constexpr int kRun = 64, kImage = 208;

DFQVIT_HOST_DEVICE int padded_keys(int tokens, int kept) {
  const int runs = (tokens + kept - 1) / kept;
  return runs * ((kept + kStep - 1) / kStep * kStep);
}
// Bytes of shared memory: keys, values, where the sums of each key begin, ToByte's constants, and queries of each warp.
template <int kDepth, int kKept>
inline int shared_bytes(int tokens, int warps) {
  return padded_keys(tokens, kKept) * (2 * kDepth + 4) + static_cast<int>(sizeof(ToByte)) + warps * kRows * kDepth;
}

// The byte of a chunk in rows of kDepth: chunks change places, so that 8 rows of one chunk lie in different banks.
template <int kDepth>
__device__ __forceinline__ int chunk_place(int row, int chunk) {
  constexpr int kChunks = kDepth / 16;
  constexpr bool kSwizzled = (kChunks & (kChunks - 1)) == 0;
  return row * kDepth + (kSwizzled ? chunk ^ (row * kChunks / 8 % kChunks) : chunk) * 16;
}

// One block's head, brought to shared memory by all its threads.
template <int kDepth, int kKept>
struct Shared {
  static constexpr int kChunks = kDepth / 16;  // of a row
  // Sums of up to 64 channels are less than 2^22 in size: added to the bits of kRounder they are floats as they are.
  static constexpr bool kSumsAreBits = kDepth <= 64;
  static constexpr int32_t kOrigin = kSumsAreBits ? kRounderBits : 0;

  uint8_t *keys, *values;
  int32_t* starts;  // of each key: kOrigin - q_zero * sum_d k
  ToByte* to_byte;
  uint8_t* queries;  // 16 of each warp
  int padded;

  __device__ __forceinline__ Shared(uint8_t* memory, int tokens)
      : keys(memory), padded(padded_keys(kKept == kImage ? kImage : tokens, kKept)) {
    values = keys + padded * kDepth;
    starts = reinterpret_cast<int32_t*>(values + padded * kDepth);
    to_byte = reinterpret_cast<ToByte*>(starts + padded);
    queries = reinterpret_cast<uint8_t*>(to_byte + 1);
  }

  // Starts the copies. `base`: of this head's q at token 0; `stride`: bytes from token to token.
  __device__ __forceinline__ void ask(const Heads& p, const uint8_t* base, const int32_t* index, uint32_t stride,
                                      int channels) {
    constexpr int kLanes = kChunks <= 2 ? 2 : kChunks <= 4 ? 4 : 8;  // that copy a row, one of its chunks each
    const int chunk = threadIdx.x % kLanes;
    if (chunk >= kChunks) return;
    const bool inside = chunk * 16 < p.depth;  // zeros elsewhere
    const uint32_t to = tile::shared_address(keys);
    const auto copy = [&](int key, const uint8_t* from) {
      const bool there = inside && key < p.tokens;
      tile::copy_async(to + chunk_place<kDepth>(key, chunk), from, there);
      tile::copy_async(to + padded * kDepth + chunk_place<kDepth>(key, chunk), from + channels, there);
    };
    const uint8_t* from = base + channels + (inside ? chunk * 16 : 0);
    int key = threadIdx.x / kLanes;
    const int step = blockDim.x / kLanes;
    if (index) {
      for (; key < padded; key += step) copy(key, from + (key < p.tokens ? index[key] : 0) * stride);
    } else {
      from += key * stride;
#pragma unroll 2
      for (; key < padded; key += step, from += step * stride) copy(key, from);
    }
  }

  // What came, made ready. Values become operands, in their own place: 16 bytes of a lane for 32 keys and 16 channels,
  // which are, for the product's column n, channel 2 n and then 2 n + 1. Their keys are those whose steps a lane finds
  // in its own sums: 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t of each 16.
  __device__ __forceinline__ void prepare(int tokens, int32_t q_zero) {
    tile::wait_for_copies<0>();  // the first queries of this warp, too
    __syncthreads();
    for (int key = threadIdx.x; key < padded; key += blockDim.x) {
      uint32_t sums[4] = {0, 0, 0, 0};  // that do not wait for each other
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int4 bytes = *reinterpret_cast<const int4*>(keys + chunk_place<kDepth>(key, chunk));
        sums[0] = __dp4a(static_cast<uint32_t>(bytes.x), kOnes, sums[0]);
        sums[1] = __dp4a(static_cast<uint32_t>(bytes.y), kOnes, sums[1]);
        sums[2] = __dp4a(static_cast<uint32_t>(bytes.z), kOnes, sums[2]);
        sums[3] = __dp4a(static_cast<uint32_t>(bytes.w), kOnes, sums[3]);
      }
      const auto sum = static_cast<int32_t>(sums[0] + sums[1] + sums[2] + sums[3]);
      starts[key] = key < tokens ? kOrigin - q_zero * sum : kSumsAreBits ? kNoKeyBits : kNoKey;
    }
    const int lane = threadIdx.x % 32;
    for (int group = threadIdx.x / 32; group < padded / kStep; group += blockDim.x / 32) {
      uint8_t* rows = values + group * kStep * kDepth;
      uint32_t m[kChunks][4];
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        load_transposed(m[chunk], tile::shared_address(rows + chunk_place<kDepth>(lane, chunk)));
      }
      __syncwarp();
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        int4 operand;
        operand.x = __byte_perm(m[chunk][0], m[chunk][1], 0x6420);
        operand.y = __byte_perm(m[chunk][2], m[chunk][3], 0x6420);
        operand.z = __byte_perm(m[chunk][0], m[chunk][1], 0x7531);
        operand.w = __byte_perm(m[chunk][2], m[chunk][3], 0x7531);
        *reinterpret_cast<int4*>(rows + chunk * 512 + lane * 16) = operand;
      }
    }
    __syncthreads();
  }
};

// 16 queries of a warp, by way of their own place in shared memory.
template <int kDepth>
struct Queries {
  static constexpr int kSteps = kDepth / 32, kChunks = kDepth / 16;
  uint32_t q[kSteps][4];

  // Starts the copies; zeros where there are no more.
  __device__ __forceinline__ static void ask(uint32_t to, const Heads& p, const uint8_t* base, const int32_t* index,
                                             uint32_t stride, int first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kChunks / 2; ++i) {
      const int row = (32 * i + lane) / kChunks, chunk = (32 * i + lane) % kChunks, at = first + row;
      const bool there = at < p.tokens && chunk * 16 < p.depth;
      const uint32_t token = index && there ? index[at] : at;
      tile::copy_async(to + chunk_place<kDepth>(row, chunk), base + token * stride + chunk * 16, there);
    }
    tile::commit_copies();
  }
  // What came.
  __device__ __forceinline__ void take(uint32_t from) {
    tile::wait_for_copies<0>();
    __syncwarp();
    const tile::Place at = tile::activation_address(threadIdx.x % 32);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) tile::load_matrices(q[s], from + chunk_place<kDepth>(at.row, at.column + 2 * s));
    __syncwarp();
  }

  // What a sum of this lane's queries must have added to be a score: -k_zero * sum_d (q - q_zero).
  __device__ __forceinline__ void shifts(int32_t (&shift)[2], int depth, int32_t q_zero, int32_t k_zero) const {
    int32_t sums[4] = {0, 0, 0, 0};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) multiply_add_unsigned(sums, q[s], kOnes, kOnes);
    shift[0] = -k_zero * (sums[0] - depth * q_zero);
    shift[1] = -k_zero * (sums[2] - depth * q_zero);
  }
};

}  // namespace attention
}  // namespace quant
}  // namespace dfqvit
