// The CUDA kernel of quant_attention, on raw pointers: scores, softmax and values of one head of one window in one
// block. No torch headers. docs/kernels/quant_attention.md says why it is as it is.
//
// Keys and values stand in shared memory as bytes. A warp takes 16 queries and keeps their scores in registers, of up
// to kKept keys: from one product come the greatest score and the steps of 1/255. Longer windows are walked in runs of
// kKept keys, once for the greatest score and back again for the steps. Both products are u8 x u8: what the zero points
// add is known for each key, and for all channels of a value, and the rest is the same for all keys of a query.
#pragma once

#include <type_traits>

#include "dfqvit/quant_attention_operands.cuh"

namespace dfqvit {
namespace quant {
namespace attention {

// Bias and mask of the scores of one lane's queries.
struct Addends {
  const float *bias, *mask;  // of this head and window, or null
  int tokens;

  // The score, float32 as the reference has it; keys that do not exist hide.
  __device__ __forceinline__ float operator()(float sum, float factor, int row, int key) const {
    if (key >= tokens || row >= tokens) return key < tokens ? 0.0f : -INFINITY;
    float s = sum * factor;
    const int64_t at = static_cast<int64_t>(row) * tokens + key;
    if (bias) s += bias[at];
    if (mask) s += mask[at];
    return s;
  }
};

// The greatest of a query's scores is known to the four lanes that share it.
__device__ __forceinline__ float greatest_of_quad(float value) {
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// 255 e^s as the bits of a float whose lowest byte is the integer it is rounded to, half to even; s is at most 0.
__device__ __forceinline__ uint32_t step_bits(float s, float log2_unit) {
  return static_cast<uint32_t>(tile::float_bits(tile::fast_exp2(fmaf(s, log2_unit, kLog2Of255)) + kRounder));
}

// Scores of 16 queries with kKept keys: those of 8 keys are a tile, of which a lane has (row, key) = (l / 4, 2 (l %
// 4)), the next key, and both 8 rows below. Floats whose differences are exact.
template <int kDepth, int kKept>
struct Scores {
  using Memory = Shared<kDepth, kKept>;
  static constexpr int kTiles = kKept / 8;
  float kept[kTiles][4];

  // Of the keys from `first` on.
  __device__ __forceinline__ void multiply(const Queries<kDepth>& queries, const Memory& shared, int first) {
    constexpr int kMatrices = 2 * Memory::kChunks;  // of 16 keys
    const int lane = threadIdx.x % 32;
    uint32_t from[kMatrices / 4];
#pragma unroll
    for (int l = 0; l < kMatrices / 4; ++l) {
      const int matrix = 4 * l + lane / 8;
      const int row = matrix / Memory::kChunks * 8 + lane % 8, chunk = matrix % Memory::kChunks;
      from[l] = tile::shared_address(shared.keys + first * kDepth + chunk_place<kDepth>(row, chunk));
    }
    const int32_t* starts = shared.starts + first + lane % 4 * 2;
#pragma unroll
    for (int pair = 0; pair < kTiles / 2; ++pair) {
      uint32_t k[kMatrices];
#pragma unroll
      for (int l = 0; l < kMatrices / 4; ++l) {
        uint32_t (&four)[4] = *reinterpret_cast<uint32_t (*)[4]>(k + 4 * l);
        tile::load_matrices(four, from[l] + pair * 16 * kDepth);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int2 start = *reinterpret_cast<const int2*>(starts + pair * 16 + half * 8);
        int32_t sum[4] = {start.x, start.y, start.x, start.y};
#pragma unroll
        for (int s = 0; s < kDepth / 32; ++s) {
          const int matrix = half * Memory::kChunks + 2 * s;
          multiply_add_unsigned(sum, queries.q[s], k[matrix], k[matrix + 1]);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          kept[2 * pair + half][c] = Memory::kSumsAreBits  ? float_of(sum[c])
                                     : sum[c] < kNoKey / 2 ? -INFINITY
                                                           : static_cast<float>(sum[c]);
        }
      }
    }
  }

  // Sums become scores with what is added to them.
  __device__ __forceinline__ void add(const Addends& addends, const int32_t (&shift)[2], float factor, int row,
                                      int first) {
    const float origin[2] = {float_of(Memory::kOrigin) - static_cast<float>(shift[0]),
                             float_of(Memory::kOrigin) - static_cast<float>(shift[1])};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        kept[i][c] =
            addends(kept[i][c] - origin[c / 2], factor, row + c / 2 * 8, first + i * 8 + threadIdx.x % 4 * 2 + c % 2);
      }
    }
  }

  // The greater ones of `top` and these. Sums that are bits are positive, but for those of no key: so are their bits.
  template <bool kAddends>
  __device__ __forceinline__ void greatest(float (&top)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (Memory::kSumsAreBits && !kAddends) {
        int32_t most = tile::float_bits(top[half]);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const int32_t a = tile::float_bits(kept[i][2 * half]), b = tile::float_bits(kept[i][2 * half + 1]);
          const int32_t more = a < b ? b : a;
          most = most < more ? more : most;
        }
        top[half] = float_of(most);
      } else {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) top[half] = fmaxf(top[half], fmaxf(kept[i][2 * half], kept[i][2 * half + 1]));
      }
    }
  }

  // Steps of 32 keys, as an operand; zeros beyond the last.
  __device__ __forceinline__ void steps(int step, const float (&top)[2], float unit, uint32_t (&a)[4]) const {
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      const int i = 4 * step + 2 * high;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (i + 1 < kTiles) {
          uint32_t bits[4];
#pragma unroll
          for (int c = 0; c < 4; ++c) bits[c] = step_bits(kept[i + c / 2][2 * half + c % 2] - top[half], unit);
          a[2 * high + half] = lowest_bytes(bits[0], bits[1], bits[2], bits[3]);
        } else {
          a[2 * high + half] = 0;
        }
      }
    }
  }
};

template <int kDepth, int kKept, bool kAddends>
__device__ __forceinline__ void attend(const Heads& p, uint8_t* memory) {
  constexpr bool kOneRun = kKept == kImage;  // else a loop, for which the registers must hold the totals too
  const int head = blockIdx.x % p.heads, place = blockIdx.x / p.heads;
  const int window = p.index ? place % p.windows : 0, of_image = p.index ? place / p.windows : place;
  const int channels = p.heads * p.depth, stride = 3 * channels;
  const int64_t image = static_cast<int64_t>(of_image) * p.windows * p.tokens * channels;  // its first result
  const uint8_t* base = p.qkv + 3 * image + head * p.depth;
  const int32_t* index = p.index ? p.index + window * p.tokens : nullptr;
  // Numbers that come from memory are asked for first: they are there before the keys.
  const int32_t q_zero = static_cast<int32_t>(p.in_zero[0]), k_zero = static_cast<int32_t>(p.in_zero[1]);
  const float unscaled = p.scale * p.in_scale[0] * p.in_scale[1];
  const float factor = p.head_scale ? unscaled * p.head_scale[head] : unscaled;
  ToByte constants(p);

  Shared<kDepth, kKept> shared(memory, p.tokens);
  shared.ask(p, base, index, stride, channels);
  const int lane = threadIdx.x % 32, all = blockDim.x / 32 * kRows;
  int first = threadIdx.x / 32 * kRows;
  const uint32_t own = tile::shared_address(shared.queries + first * kDepth);  // this warp's queries
  Queries<kDepth> queries;
  queries.ask(own, p, base, index, stride, first);
  const float unit = kAddends ? kLog2E : fmaxf(factor * kLog2E, kLeastUnit);
  const int64_t square = static_cast<int64_t>(p.tokens) * p.tokens;
  const Addends addends{p.bias ? p.bias + head * square : nullptr, p.mask ? p.mask + window * square : nullptr,
                        p.tokens};
  if (threadIdx.x == 0) {
    constants.prepare();
    *shared.to_byte = constants;
  }
  shared.prepare(p.tokens, q_zero);

#pragma unroll 1
  for (; first < p.tokens; first += all) {
    const int row = first + lane / 4;
    uint32_t token[2] = {static_cast<uint32_t>(row), static_cast<uint32_t>(row + 8)};
    if (index) {
      const int last = p.tokens - 1;
      token[0] = index[row < last ? row : last], token[1] = index[row + 8 < last ? row + 8 : last];
    }
    queries.take(own);
    if (first + all < p.tokens) queries.ask(own, p, base, index, stride, first + all);  // while these go on
    int32_t shift[2] = {0, 0};
    if constexpr (kAddends) queries.shifts(shift, p.depth, q_zero, k_zero);
    Scores<kDepth, kKept> scores;
    float top[2] = {-INFINITY, -INFINITY};
    const auto find = [&](int key) {
      scores.multiply(queries, shared, key);
      if constexpr (kAddends) scores.add(addends, shift, factor, row, key);
    };
    int key = 0;
    find(key);
    scores.template greatest<kAddends>(top);
    if constexpr (!kOneRun) {
#pragma unroll 1
      while (key + kKept < p.tokens) {
        key += kKept;
        find(key);
        scores.template greatest<kAddends>(top);
      }
    }
    top[0] = greatest_of_quad(top[0]);
    top[1] = greatest_of_quad(top[1]);

    int32_t total[kDepth / 8][4] = {}, steps[4] = {};
#pragma unroll 1
    while (true) {
#pragma unroll
      for (int step = 0; step < (kKept + kStep - 1) / kStep; ++step) {
        uint32_t a[4];
        scores.steps(step, top, unit, a);
        multiply_add_unsigned(steps, a, kOnes, kOnes);
        const uint8_t* from = shared.values + (key + step * kStep) * kDepth + lane * 16;
#pragma unroll
        for (int chunk = 0; chunk < kDepth / 16; ++chunk) {
          const int4 v = *reinterpret_cast<const int4*>(from + chunk * 512);
          multiply_add_unsigned(total[2 * chunk], a, v.x, v.y);
          multiply_add_unsigned(total[2 * chunk + 1], a, v.z, v.w);
        }
      }
      if (kOneRun || key == 0) break;
      key -= kKept;  // back to where the walk began
      find(key);
    }
    const ToByte to_byte = *shared.to_byte;
    write<kDepth>(total, steps, p, to_byte, image + head * p.depth, token, row);
  }
}

template <int kDepth, int kKept, bool kAddends>
__global__ void __launch_bounds__(32 * kMostWarps, 2) attention_kernel(const Heads p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  attend<kDepth, kKept, kAddends>(p, memory);
}

// Calls `run` with the depth, and the keys that are kept, as constants of its arguments' types.
template <typename Run>
auto with_shape(const Heads& p, const Run& run) {
  constexpr std::integral_constant<int, kRun> kept;
  if (p.depth <= 32) return run(std::integral_constant<int, 32>(), kept);
  if (p.depth <= 64 && p.tokens > kRun && p.tokens <= kImage) {
    return run(std::integral_constant<int, 64>(), std::integral_constant<int, kImage>());
  }
  if (p.depth <= 64) return run(std::integral_constant<int, 64>(), kept);
  if (p.depth <= 96) return run(std::integral_constant<int, 96>(), kept);
  return run(std::integral_constant<int, 128>(), kept);
}

// Blocks of so many warps that a multiprocessor with `shared` bytes of shared memory has room for.
template <int kDepth, int kKept>
inline int blocks_together(int tokens, int warps, int shared) {
  const int by_memory = shared / (shared_bytes<kDepth, kKept>(tokens, warps) + 1024), by_registers = 16 / warps;
  return by_memory < by_registers ? by_memory : by_registers;
}
// Warps of a block: those with which most tiles of queries are under way at once. Of equals the few: blocks that wait
// at different times; but not fewer than three, since the last blocks of a launch are slow then.
template <int kDepth, int kKept>
inline int warps_for(int tokens, int shared) {
  const int tiles = (tokens + kRows - 1) / kRows;
  int best = 1;
  float most = 0.0f;
  for (const int warps : {3, 4, 5, 6, 7, 2, 1}) {
    const int rounds = (tiles + warps - 1) / warps;
    const float busy = static_cast<float>(blocks_together<kDepth, kKept>(tokens, warps, shared) * tiles) / rounds;
    if (busy > most * 1.001f) most = busy, best = warps;
  }
  return best;
}

}  // namespace attention
}  // namespace quant
}  // namespace dfqvit
