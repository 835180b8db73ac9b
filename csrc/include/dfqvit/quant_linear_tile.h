// The arithmetic of the CUDA kernels of quant_linear that needs no GPU: which thread holds what, the unpacking of
// weights, and the epilogue. tests/kernels/cuda_on_cpu/quant_linear.cpp runs it on the CPU. No torch headers.
//
// A block of threads sums a tile of the result, walking K in steps of 64 or 128. In shared memory a step is two arrays
// of rows of so many bytes: u8 activations, then s8 weights (one row an output). A row is 4 or 8 chunks of 16 bytes,
// placed by `shared_offset` so that 8 rows that are read together lie in different banks.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "dfqvit/host_device.h"

namespace dfqvit {
namespace quant {
namespace tile {

constexpr int kChunk = 16;                 // bytes of one asynchronous copy
constexpr int kStages = 3;                 // steps in shared memory: one in use, two on their way
constexpr int kMmaM = 16, kMmaN = 8;       // the product of one mma.sync, 32 deep
constexpr int kMmaChunks = 32 / kChunk;    // of its depth
constexpr int kGroup = 128, kGroupM = 64;  // threads of a warpgroup (4 warps), and rows of its wgmma, also 32 deep

enum class Type : int { f32, bf16, f16, u8 };
enum class Activation : int { none, gelu, gelu_tanh, quick_gelu, silu };

// What multiplies: every warp for itself, from registers (sm_80 on); or four together, from shared memory (sm_90a),
// where every thread copies its chunks of the operands or, with `wgmma_of_tiles`, one thread whole tiles of them.
enum class Product { mma_sync, wgmma, wgmma_of_tiles };

// A tile of kM x kN sums, shared among kWarpsM x kWarpsN warps, in steps of kDepth. kBlocks fit on a multiprocessor
// together.
template <Product kProduct_, int kM_, int kN_, int kDepth_, int kWarpsM_, int kWarpsN_, int kBlocks_>
struct Shape {
  static constexpr Product kProduct = kProduct_;
  static constexpr int kDepth = kDepth_, kChunks = kDepth / kChunk;  // of a row in shared memory
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kBlocks = kBlocks_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;        // the part of a warp,
  static constexpr int kCountM = kWarpM / kMmaM, kCountN = kWarpN / kMmaN;  // in so many instructions
  static constexpr int kCopiesA = kM * kChunks / kThreads, kCopiesB = kN * kChunks / kThreads;  // chunks of a thread
  static constexpr int kStageBytes = (kM + kN) * kDepth;
  static constexpr int kStagesBytes = kStages * kStageBytes;
  // Behind the stages: a barrier for each, where tiles arrive.
  static constexpr int kSharedBytes = kStagesBytes + (kProduct == Product::wgmma_of_tiles ? 8 * kStages : 0);
  // On their way to the result 16 rows of a warp's sums pass through shared memory (a panel), so that neighbouring
  // lanes then write 4 columns each of a row. With 8 more than its columns, the 4 rows that half a warp stores at once
  // lie in different banks.
  static constexpr int kPanelPitch = kWarpN + 8, kPanelBytes = kMmaM * kPanelPitch * 4;
  static constexpr int kRowLanes = kWarpN / 4, kRowsTogether = 32 / kRowLanes;
  static_assert(kWarpN % 32 == 0 && kThreads / 32 * kPanelBytes <= kStagesBytes, "panels take the place of stages");
  static_assert(kM * kChunks % kThreads == 0 && kN * kChunks % kThreads == 0 && kCountN % 2 == 0, "no remainders");
  // A warpgroup's sums are 64 x kN, of which each warp holds 16 rows: as those of mma.sync lie, one operand high.
  static_assert(kProduct == Product::mma_sync || (kWarpM == kMmaM && kWarpsN == 1 && kThreads % kGroup == 0), "");
};
// 64 x 64 a warp: smaller parts read shared memory more than they multiply.
using Large = Shape<Product::mma_sync, 128, 128, 64, 2, 2, 2>;
using Small = Shape<Product::mma_sync, 64, 64, 64, 2, 2, 4>;
// Two warpgroups, 64 x 128 each. While one block multiplies, the other one on the multiprocessor writes results.
using Group = Shape<Product::wgmma, 128, 128, 128, 8, 1, 2>;
using GroupOfTiles = Shape<Product::wgmma_of_tiles, 128, 128, 128, 8, 1, 2>;  // weights of 8 bits only

struct Place {
  int row, column;
};

// Chunk `i` that a thread copies: its row and its number in the row, which is the same for all of them.
template <typename S>
DFQVIT_HOST_DEVICE Place copied(int thread, int i) {
  return {thread / S::kChunks + i * (S::kThreads / S::kChunks), thread % S::kChunks};
}
// The byte at which a chunk stands in its array: the chunks of a row change places, alike again after 8 rows. With rows
// of 128 bytes this is the 128-byte swizzle that wgmma's descriptors name.
template <typename S>
DFQVIT_HOST_DEVICE int shared_offset(int row, int chunk) {
  return row * S::kDepth + (chunk ^ (row * S::kChunks / 8 % S::kChunks)) * kChunk;
}
// wgmma's descriptor of an operand at `shared`, in rows of 128 bytes placed as above, from the first row of an array on
// (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", matrix descriptor format): in units of 16 bytes bits
// 0-13 the address, 16-29 the leading offset (unused where rows fill the swizzle; 1), 32-45 the bytes from 8 rows to
// the next 8; bits 62-63 the swizzle, 1 for 128 bytes. Bits 49-51 are 0 for arrays at multiples of 1024.
DFQVIT_HOST_DEVICE uint64_t operand_descriptor(uint32_t shared) {
  return uint64_t{1} << 62 | uint64_t{8 * 128 / 16} << 32 | uint64_t{1} << 16 | (shared & 0x3FFFF) >> 4;
}
// The row and chunk whose address a lane gives to `ldmatrix.x4`: for one operand of 16 rows of activations,
DFQVIT_HOST_DEVICE Place activation_address(int lane) {
  return {lane % 16, lane / 16};
}
// and for two operands of 8 outputs each.
DFQVIT_HOST_DEVICE Place weight_address(int lane) {
  return {lane / 16 * 8 + lane % 8, lane / 8 % 2};
}
// Where sum i of a lane belongs in the 16 x 8 of one instruction.
DFQVIT_HOST_DEVICE Place summed(int lane, int i) {
  return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
}

// Where the four neighbouring sums that a lane takes from a panel stand; then in every kRowsTogether-th row below.
template <typename S>
DFQVIT_HOST_DEVICE Place finished(int lane) {
  return {lane / S::kRowLanes, lane % S::kRowLanes * 4};
}
// The token of the row `down` below one of `token`, without a division where there are at least so many.
DFQVIT_HOST_DEVICE int token_below(int token, int down, int tokens) {
  token += down;
  return token < tokens ? token : tokens >= down ? token - tokens : token % tokens;
}

// The first row and output of a warp, in its tile.
template <typename S>
DFQVIT_HOST_DEVICE Place warp_origin(int warp) {
  return {warp / S::kWarpsN * S::kWarpM, warp % S::kWarpsN * S::kWarpN};
}
// The first row and output of a tile: tiles that follow each other share their activations.
template <typename S>
DFQVIT_HOST_DEVICE Place tile_origin(int64_t tile, int outputs) {
  const int across = (outputs + S::kN - 1) / S::kN;
  return {static_cast<int>(tile / across) * S::kM, static_cast<int>(tile % across) * S::kN};
}
template <typename S>
inline int64_t tile_count(int64_t rows, int64_t outputs) {
  return (rows + S::kM - 1) / S::kM * ((outputs + S::kN - 1) / S::kN);
}

// 16 weights of 2 to 7 bits as they stand in memory (kernels/pack_weight): 2 * bits bytes, little-endian.
struct Packed {
  uint64_t low, high;
};
struct alignas(16) Unpacked {
  uint32_t word[4];
};

// The widest word that the bytes of 16 weights are a multiple of: rows must be, too.
template <int kBits>
using Wide = std::conditional_t<kBits % 4 == 0, uint64_t, std::conditional_t<kBits % 2 == 0, uint32_t, uint16_t>>;

template <int kBits>
DFQVIT_HOST_DEVICE Packed load_packed(const uint8_t* from) {
  constexpr int kWord = static_cast<int>(sizeof(Wide<kBits>));
  Packed packed{0, 0};
  DFQVIT_UNROLL
  for (int i = 0; i < 2 * kBits; i += kWord) {
    const uint64_t word = reinterpret_cast<const Wide<kBits>*>(from)[i / kWord];
    (i < 8 ? packed.low : packed.high) |= word << 8 * (i % 8);
  }
  return packed;
}

// Four signed fields of kBits in the low bits of `fields`, to four signed bytes.
template <int kBits>
DFQVIT_HOST_DEVICE uint32_t spread(uint32_t fields) {
  constexpr uint32_t kPair = (1u << 2 * kBits) - 1, kField = ((1u << kBits) - 1) * 0x00010001u;
  constexpr uint32_t kSign = (1u << (kBits - 1)) * 0x01010101u, kTop = 0x80808080u;
  const uint32_t pairs = (fields & kPair) | ((fields << (16 - 2 * kBits)) & kPair << 16);
  const uint32_t bytes = (pairs & kField) | ((pairs << (8 - kBits)) & kField << 8);
  return ((bytes ^ (kSign | kTop)) - kSign) ^ kTop;  // (v ^ sign) - sign in each byte; the top bit keeps borrows inside
}
template <int kBits>
DFQVIT_HOST_DEVICE Unpacked unpack(const Packed& packed) {
  static_assert(kBits >= 2 && kBits <= 7, "8-bit weights are bytes already");
  const uint64_t group[2] = {packed.low, packed.low >> 8 * kBits | packed.high << (64 - 8 * kBits)};
  Unpacked result;
  DFQVIT_UNROLL
  for (int i = 0; i < 4; ++i) {
    constexpr uint32_t kFour = (1u << 4 * kBits) - 1;
    result.word[i] = spread<kBits>(static_cast<uint32_t>(group[i / 2] >> 4 * kBits * (i % 2)) & kFour);
  }
  return result;
}
// Weight k of a row, one at a time.
DFQVIT_HOST_DEVICE int unpacked_at(const uint8_t* row, int64_t k, int bits) {
  const int bit = static_cast<int>(k % 8) * bits, sign = 1 << (bits - 1);
  const uint8_t* byte = row + k / 8 * bits + bit / 8;
  const int pair = byte[0] | (bit % 8 + bits > 8 ? byte[1] << 8 : 0);
  return (((pair >> bit % 8) & ((1 << bits) - 1)) ^ sign) - sign;
}

// clamp(round(value / scale) + zero, least, greatest), half to even.
DFQVIT_HOST_DEVICE float quantized(float value, float scale, float zero, float least, float greatest) {
  return fminf(fmaxf(nearbyintf(value / scale) + zero, least), greatest);
}
// offset: x_zero * sum_k qw; scale: x_scale * w_scale.
DFQVIT_HOST_DEVICE float dequantized(int32_t sum, int32_t offset, float scale) {
  return scale * static_cast<float>(sum - offset);
}

// 1.5 * 2^23: a float of at most 2^22 in size plus this is rounded half to even to a whole number. Its bits.
constexpr float kRounder = 12582912.0f;
constexpr int32_t kRounderBits = 0x4B400000;
constexpr float kFarBelow = 4096.0f;  // minus this is below every grid
// Scales whose inverse stands for a division wherever a quotient matters; GELU, at least -0.17, over the least of them
// is well within what kRounder rounds.
constexpr float kLeastStep = 0x1p-20f, kGreatestStep = 0x1p100f;

// GELU as y / (1 + 2^(y P(y^2))): the logarithm of a normal distribution's odds is y times an even function. P fitted
// so that the greatest error over 1 + |GELU| is least (reweighted least squares): 2.9e-6; and GELU's tanh form and
// QuickGELU and SiLU, which are of this form themselves.
constexpr float kGelu[5] = {-0x1.26a8fcp+1f, -0x1.af1a36p-4f, 0x1.841d8ep-12f, 0x1.6c174cp-14f, -0x1.a8e85cp-19f};
constexpr float kGeluTanh[5] = {-0x1.26aec2p+1f, -0x1.a5a7d0p-4f, 0.0f, 0.0f, 0.0f};
constexpr float kQuickGelu[5] = {-0x1.3a4cbep+1f, 0.0f, 0.0f, 0.0f, 0.0f};
constexpr float kSilu[5] = {-0x1.715476p+0f, 0.0f, 0.0f, 0.0f, 0.0f};
constexpr float kGeluLimit = 28.0f;  // of y^2: beyond, the odds are as good as 0 or infinite

DFQVIT_HOST_DEVICE float activated(float y, Activation activation) {
  if (activation == Activation::gelu) return y * 0.5f * (1.0f + erff(y * 0.70710678f));
  if (activation == Activation::gelu_tanh) {
    return 0.5f * y * (1.0f + tanhf(0.79788456f * (y + 0.044715f * (y * y * y))));
  }
  if (activation == Activation::quick_gelu) return y / (1.0f + expf(-1.702f * y));
  if (activation == Activation::silu) return y / (1.0f + expf(-y));
  return y;
}

}  // namespace tile
}  // namespace quant
}  // namespace dfqvit
