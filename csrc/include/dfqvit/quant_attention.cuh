// The CUDA kernel of quant_attention, on raw pointers: scores, softmax and values of one head of one window in one
// block. No torch headers. docs/kernels/quant_attention.md says why it is as it is.
//
// Keys, and values transposed, stand in shared memory as signed bytes. A warp takes 16 or 32 queries and walks the keys
// twice: for the greatest score of each query, then for the steps of 1/255 and their product with the values. The
// scores are multiplied twice because registers do not hold them; the tensor cores have time for it.
#pragma once

#include "dfqvit/device_floats.cuh"
#include "dfqvit/quant_attention_launch.h"
#include "dfqvit/quant_linear_ptx.cuh"
#include "dfqvit/quant_linear_tile.h"

namespace dfqvit {
namespace quant {
namespace attention {

using tile::kRounder;
using tile::kRounderBits;

constexpr int kMostWarps = 7;           // of a block: 224 queries, and registers for two blocks
constexpr int kKeys = 32;               // of a step: the depth of one product with the values
constexpr int kPad = 16;                // bytes after a row in shared memory: 8 rows then start in different banks
constexpr int32_t kNoKey = -(1 << 30);  // the sums of keys that do not exist begin here: never the greatest
constexpr float kLog2E = 1.44269504f, kLog2Of255 = 7.99435344f;
constexpr uint32_t kSignBits = 0x80808080u, kOnes = 0x01010101u;  // u8 ^ sign bit = s8 + 128

DFQVIT_HOST_DEVICE int padded_keys(int tokens) {
  return (tokens + kKeys - 1) / kKeys * kKeys;
}
// Bytes of shared memory: keys, transposed values, and where the sums of each key begin.
template <int kDepth>
inline int shared_bytes(int tokens) {
  const int keys = padded_keys(tokens);
  return keys * (kDepth + kPad) + kDepth * (keys + kPad) + keys * 4;
}

__device__ __forceinline__ uint32_t word_at(const void* pointer) {
  return *static_cast<const uint32_t*>(pointer);
}

// What a lane holds of a product's result are two neighbouring columns of each 8. Columns of values are so assigned to
// channels that these are 2 * tiles neighbouring channels; that of column n of tile j is
// 2 * tiles * (n / 2) + 2 j + n % 2. Here the row of a channel in shared memory, 8 j + n.
template <int kDepth>
__device__ __forceinline__ int value_row(int channel) {
  constexpr int kTiles = kDepth / 8;
  return channel % (2 * kTiles) / 2 * 8 + channel / (2 * kTiles) * 2 + channel % 2;
}

// One block's head, brought to shared memory by all its threads.
template <int kDepth>
struct Shared {
  static constexpr int kKeyPitch = kDepth + kPad;
  uint8_t *keys, *values;  // [padded keys][kKeyPitch] and [kDepth][value_pitch], both signed
  int32_t* starts;         // of each key: -q_zero * sum_d k
  int padded, value_pitch;

  __device__ __forceinline__ Shared(uint8_t* memory, int tokens)
      : keys(memory), padded(padded_keys(tokens)), value_pitch(padded + kPad) {
    values = keys + padded * kKeyPitch;
    starts = reinterpret_cast<int32_t*>(values + kDepth * value_pitch);
  }

  // `base`: of this head's q at token 0; `stride`: bytes from token to token.
  __device__ __forceinline__ void fill(const Heads& p, const uint8_t* base, const int32_t* index, int stride,
                                       int channels, int32_t q_zero) {
    constexpr int kChunks = kDepth / 16;
    const auto token = [&](int at) { return static_cast<int64_t>(index ? index[at] : at) * stride; };
    for (int i = threadIdx.x; i < padded * kChunks; i += blockDim.x) {
      const int key = i / kChunks, chunk = i % kChunks;
      int4 bytes{0, 0, 0, 0};  // where there is none, which meets steps of 0, or queries of 0
      if (key < p.tokens && chunk * 16 < p.depth) {
        bytes = *reinterpret_cast<const int4*>(base + channels + token(key) + chunk * 16);
        bytes.x ^= kSignBits, bytes.y ^= kSignBits, bytes.z ^= kSignBits, bytes.w ^= kSignBits;
      }
      *reinterpret_cast<int4*>(keys + key * kKeyPitch + chunk * 16) = bytes;
    }
    // Four keys by four channels are turned over in registers. The keys of a word are those whose steps a lane finds in
    // its own sums: 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t of each 16.
    for (int i = threadIdx.x; i < padded / 4 * (kDepth / 4); i += blockDim.x) {
      const int channel = i % (kDepth / 4) * 4, place = i / (kDepth / 4) * 4;
      const int first = place / 16 * 16 + place % 16 / 2;
      uint32_t row[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int key = first + k % 2 + k / 2 * 8;
        const bool there = key < p.tokens && channel < p.depth;
        row[k] = there ? word_at(base + 2 * channels + token(key) + channel) ^ kSignBits : 0;
      }
      const uint32_t low01 = __byte_perm(row[0], row[1], 0x5140), high01 = __byte_perm(row[0], row[1], 0x7362);
      const uint32_t low23 = __byte_perm(row[2], row[3], 0x5140), high23 = __byte_perm(row[2], row[3], 0x7362);
      const uint32_t turned[4] = {__byte_perm(low01, low23, 0x5410), __byte_perm(low01, low23, 0x7632),
                                  __byte_perm(high01, high23, 0x5410), __byte_perm(high01, high23, 0x7632)};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        *reinterpret_cast<uint32_t*>(values + value_row<kDepth>(channel + c) * value_pitch + place) = turned[c];
      }
    }
    __syncthreads();
    for (int key = threadIdx.x; key < padded; key += blockDim.x) {
      int sum = 0;
#pragma unroll
      for (int d = 0; d < kDepth; d += 4) {
        sum = __dp4a(static_cast<int>(word_at(keys + key * kKeyPitch + d)), static_cast<int>(kOnes), sum);
      }
      starts[key] = key < p.tokens ? -q_zero * sum : kNoKey;
    }
    __syncthreads();
  }
};

// 16 queries a tile, and what belongs to them.
template <int kDepth, int kTiles>
struct Queries {
  static constexpr int kSteps = kDepth / 32;
  uint32_t q[kTiles][kSteps][4];
  int row[kTiles][2];        // of the window, of this lane's two rows of a tile
  int32_t shift[kTiles][2];  // (128 - k_zero) * sum_d (q - q_zero): what signed keys leave out of a score

  __device__ __forceinline__ void load(const Heads& p, const uint8_t* base, const int32_t* index, int stride, int first,
                                       int32_t q_zero, int32_t k_zero) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row[i][half] = first + 16 * i + lane / 4 + 8 * half;
        const int at = row[i][half] < p.tokens ? row[i][half] : p.tokens - 1;
        const uint8_t* from = base + static_cast<int64_t>(index ? index[at] : at) * stride + lane % 4 * 4;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          q[i][s][half] = 32 * s < p.depth ? word_at(from + 32 * s) : 0;
          q[i][s][half + 2] = 32 * s + 16 < p.depth ? word_at(from + 32 * s + 16) : 0;
        }
      }
      int32_t sums[4] = {0, 0, 0, 0};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) tile::multiply_add(sums, q[i][s], kOnes, kOnes);
      shift[i][0] = (128 - k_zero) * (sums[0] - p.depth * q_zero);
      shift[i][1] = (128 - k_zero) * (sums[2] - p.depth * q_zero);
    }
  }
};

// The sums of `kTiles` tiles of queries with 8 keys from `key` on, less each query's shift.
template <int kDepth, int kTiles>
__device__ __forceinline__ void score(const Queries<kDepth, kTiles>& queries, const Shared<kDepth>& shared, int key,
                                      int32_t (&sum)[kTiles][4]) {
  const int lane = threadIdx.x % 32;
  const int2 start = *reinterpret_cast<const int2*>(shared.starts + key + lane % 4 * 2);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) sum[i][0] = sum[i][2] = start.x, sum[i][1] = sum[i][3] = start.y;
  const uint32_t row = tile::shared_address(shared.keys + (key + lane % 8) * Shared<kDepth>::kKeyPitch);
#pragma unroll
  for (int s = 0; s < kDepth / 32; s += 2) {  // four chunks of 16 at once; of the last two where there are no more
    uint32_t k[4];
    const int chunk = s * 2 + lane / 8;
    tile::load_matrices(k, row + (chunk < kDepth / 16 ? chunk : chunk - 2) * 16);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      tile::multiply_add(sum[i], queries.q[i][s], k[0], k[1]);
      if (s + 1 < kDepth / 32) tile::multiply_add(sum[i], queries.q[i][s + 1], k[2], k[3]);
    }
  }
}

// Bias and mask of the scores of one lane's query, at its first two keys of each 8.
struct Addends {
  const float *bias, *mask;  // of this head and window, or null
  int tokens;

  // The score of `sum` at a key, float32 as the reference has it; keys that do not exist hide.
  __device__ __forceinline__ float operator()(int32_t sum, float factor, int row, int key) const {
    if (key >= tokens || row >= tokens) return key < tokens ? 0.0f : -INFINITY;
    float s = static_cast<float>(sum) * factor;
    const int64_t at = static_cast<int64_t>(row) * tokens + key;
    if (bias) s += bias[at];
    if (mask) s += mask[at];
    return s;
  }
};

// The greatest of a query's scores is known to the four lanes that share it.
template <typename T>
__device__ __forceinline__ T greatest_of_quad(T value) {
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, value, distance);
    value = value < other ? other : value;
  }
  return value;
}

// 255 e^s as the bits of a float whose lowest byte is the integer it is rounded to, half to even; s is at most 0.
__device__ __forceinline__ uint32_t step_bits(float s, float log2_unit) {
  return static_cast<uint32_t>(tile::float_bits(tile::fast_exp2(fmaf(s, log2_unit, kLog2Of255)) + kRounder));
}
__device__ __forceinline__ uint32_t lowest_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// 1 for each of a lane's four keys of 16 (the first, the next, and those 8 behind) that is less than `left` away.
__device__ __forceinline__ uint32_t ones_at(int left) {
  return left > 9 ? kOnes : (left > 0 ? 1u : 0u) | (left > 1 ? 1u << 8 : 0u) | (left > 8 ? 1u << 16 : 0u);
}

// y = v_scale * total / sum of the steps, to a byte. The product with an inverse stands for both divisions unless it is
// so near the middle of two integers that they may be rounded otherwise.
struct ToByte {
  float v_scale, out_scale, start, greatest;
  bool divisible;  // by way of an inverse

  __device__ __forceinline__ uint32_t operator()(int32_t total, float steps, float inverse) const {
    const float ratio = fminf(fmaxf(static_cast<float>(total) * inverse, -4096.0f), 4096.0f);
    float rounded = (ratio + kRounder) - kRounder;
    if (!divisible || fabsf(ratio - rounded) > 0.5f - 0x1p-11f) {
      const float y = v_scale * static_cast<float>(total) / steps;
      rounded = nearbyintf(y / out_scale);
    }
    return static_cast<uint32_t>(fminf(fmaxf(rounded + start, 0.0f), greatest));
  }
};

template <int kDepth, int kTiles, bool kAddends>
__device__ __forceinline__ void attend(const Heads& p, uint8_t* memory) {
  constexpr int kColumns = kDepth / 8;  // tiles of values
  const int head = blockIdx.x % p.heads, place = blockIdx.x / p.heads, window = place % p.windows;
  const int channels = p.heads * p.depth, stride = 3 * channels;
  const int64_t first_token = static_cast<int64_t>(place / p.windows) * p.windows * p.tokens;
  const uint8_t* base = p.qkv + first_token * stride + head * p.depth;
  const int32_t* index = p.index ? p.index + window * p.tokens : nullptr;
  const int32_t q_zero = static_cast<int32_t>(p.in_zero[0]), k_zero = static_cast<int32_t>(p.in_zero[1]);
  const int32_t v_shift = 128 - static_cast<int32_t>(p.in_zero[2]);
  const float unscaled = p.scale * p.in_scale[0] * p.in_scale[1];
  const float factor = p.head_scale ? unscaled * p.head_scale[head] : unscaled;
  const int64_t square = static_cast<int64_t>(p.tokens) * p.tokens;
  const Addends addends{p.bias ? p.bias + head * square : nullptr, p.mask ? p.mask + window * square : nullptr,
                        p.tokens};
  Shared<kDepth> shared(memory, p.tokens);
  shared.fill(p, base, index, stride, channels, q_zero);

  const float out_scale = p.out_scale ? *p.out_scale : 1.0f;
  const ToByte to_byte{p.in_scale[2], out_scale, p.out_zero ? *p.out_zero : 0.0f, p.out_greatest,
                       out_scale >= tile::kLeastStep && out_scale <= tile::kGreatestStep};
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int first = threadIdx.x / 32 * 16 * kTiles; first < p.tokens; first += warps * 16 * kTiles) {
    Queries<kDepth, kTiles> queries;
    queries.load(p, base, index, stride, first, q_zero, k_zero);

    int32_t most[kTiles][2];
    float top[kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      most[i][0] = most[i][1] = kNoKey - (1 << 29);
      top[i][0] = top[i][1] = -INFINITY;
    }
#pragma unroll 1
    for (int key = 0; key < p.tokens; key += 8) {
      int32_t sum[kTiles][4];
      score<kDepth, kTiles>(queries, shared, key, sum);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if constexpr (kAddends) {
            const float s =
                addends(sum[i][c] + queries.shift[i][c / 2], factor, queries.row[i][c / 2], key + lane % 4 * 2 + c % 2);
            top[i][c / 2] = fmaxf(top[i][c / 2], s);
          } else {
            most[i][c / 2] = most[i][c / 2] < sum[i][c] ? sum[i][c] : most[i][c / 2];
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kAddends) {
          top[i][half] = greatest_of_quad(top[i][half]);
        } else {
          most[i][half] = greatest_of_quad(most[i][half]);
        }
      }
    }

    int32_t total[kTiles][kColumns][4] = {}, steps[kTiles][4] = {};
    const float unit = kAddends ? kLog2E : factor * kLog2E;
#pragma unroll 1
    for (int key = 0; key < p.tokens; key += kKeys) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        uint32_t bits[2][kTiles][4];
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const int at = key + high * 16 + part * 8;
          int32_t sum[kTiles][4];
          score<kDepth, kTiles>(queries, shared, at, sum);
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              if constexpr (kAddends) {
                const float s = addends(sum[i][c] + queries.shift[i][c / 2], factor, queries.row[i][c / 2],
                                        at + lane % 4 * 2 + c % 2);
                bits[part][i][c] = step_bits(s - top[i][c / 2], unit);
              } else {
                bits[part][i][c] = step_bits(static_cast<float>(sum[i][c] - most[i][c / 2]), unit);
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          a[i][2 * high] = lowest_bytes(bits[0][i][0], bits[0][i][1], bits[1][i][0], bits[1][i][1]);
          a[i][2 * high + 1] = lowest_bytes(bits[0][i][2], bits[0][i][3], bits[1][i][2], bits[1][i][3]);
        }
      }
      const uint32_t ones[2] = {ones_at(p.tokens - key - lane % 4 * 2), ones_at(p.tokens - key - 16 - lane % 4 * 2)};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) tile::multiply_add(steps[i], a[i], ones[0], ones[1]);
      const uint32_t row = tile::shared_address(shared.values + (lane / 16 * 8 + lane % 8) * shared.value_pitch + key +
                                                lane / 8 % 2 * 16);
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        uint32_t v[4];
        tile::load_matrices(v, row + j * 8 * shared.value_pitch);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          tile::multiply_add(total[i][j], a[i], v[0], v[1]);
          tile::multiply_add(total[i][j + 1], a[i], v[2], v[3]);
        }
      }
    }

    const int channel = lane % 4 * 2 * kColumns;  // of this lane's first
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (queries.row[i][half] >= p.tokens) continue;
        const int64_t token = first_token + (index ? index[queries.row[i][half]] : queries.row[i][half]);
        const int64_t at = token * channels + head * p.depth + channel;
        const int32_t shift = steps[i][2 * half] * v_shift;
        const float sum = static_cast<float>(steps[i][2 * half]), inverse = to_byte.v_scale / (sum * out_scale);
#pragma unroll
        for (int j = 0; j < kColumns; j += 4) {  // eight channels
          if (channel + 2 * j >= p.depth) continue;
          if (p.out_scale) {
            uint32_t q[8];
#pragma unroll
            for (int c = 0; c < 8; ++c) q[c] = to_byte(total[i][j + c / 2][2 * half + c % 2] + shift, sum, inverse);
            *reinterpret_cast<int2*>(static_cast<uint8_t*>(p.out) + at + 2 * j) =
                make_int2(static_cast<int>(lowest_bytes(q[0], q[1], q[2], q[3])),
                          static_cast<int>(lowest_bytes(q[4], q[5], q[6], q[7])));
          } else {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
              const float whole = static_cast<float>(total[i][j + c / 2][2 * half + c % 2] + shift);
              static_cast<float*>(p.out)[at + 2 * j + c] = to_byte.v_scale * whole / sum;
            }
          }
        }
      }
    }
  }
}

// Queries of a warp, in tiles of 16: two where the results of both, and what is added to scores, fit in registers.
template <int kDepth, bool kAddends>
constexpr int kTilesOfWarp = kDepth <= (kAddends ? 32 : 64) ? 2 : 1;

template <int kDepth, bool kAddends>
__global__ void __launch_bounds__(32 * kMostWarps, 2) attention_kernel(const Heads p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  attend<kDepth, kTilesOfWarp<kDepth, kAddends>, kAddends>(p, memory);
}
// Warps of a block: so many that none has more rounds than another needs.
template <int kDepth, bool kAddends>
inline int warps_for(int tokens) {
  constexpr int kRows = 16 * kTilesOfWarp<kDepth, kAddends>;
  const int groups = (tokens + kRows - 1) / kRows;
  const int rounds = (groups + kMostWarps - 1) / kMostWarps;
  return (groups + rounds - 1) / rounds;
}

}  // namespace attention
}  // namespace quant
}  // namespace dfqvit
