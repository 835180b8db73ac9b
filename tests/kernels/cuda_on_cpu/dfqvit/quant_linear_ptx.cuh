// The instructions of csrc/include/dfqvit/quant_linear_ptx.cuh for a CPU, after the words of the PTX manual. Copies are
// made as late as they may be: when they are waited for. Until then their place holds rubbish.
#pragma once

#include "emulator.h"

namespace dfqvit {
namespace quant {
namespace tile {

constexpr uint32_t kSharedLimit = 227 << 10;
alignas(1024) inline uint8_t memory[kSharedLimit];
alignas(1024) inline uint8_t shown[kSharedLimit];  // what of it the "async proxy" sees (quant_linear_wgmma.cuh)
inline uint32_t shared_size = kSharedLimit;        // of the kernel that runs

inline uint8_t* shared_pointer(uint32_t address) {
  if (address % 16 != 0 || address + 16 > shared_size) std::abort();
  return memory + address;
}
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - memory);
}

// This thread wrote a chunk: until it says so, wgmma may find anything there.
inline void written(uint8_t* chunk) {
  std::memset(shown + (chunk - memory), 0xAB, 16);
  emulator::self().unshown.push_back(chunk);
}

inline void copy_async(uint32_t shared, const void* global, bool there) {
  if (there && reinterpret_cast<uintptr_t>(global) % 16 != 0) std::abort();
  uint8_t* to = shared_pointer(shared);
  std::memset(to, 0xAB, 16);
  std::memset(shown + shared, 0xAB, 16);
  emulator::self().open.push_back({to, global, there});
}
inline void commit_copies() {
  emulator::Fiber& fiber = emulator::self();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int kNewest>
void wait_for_copies() {
  auto& groups = emulator::self().groups;
  for (; groups.size() > kNewest; groups.pop_front()) {
    for (const emulator::Copy& copy : groups.front()) {
      copy.there ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
      written(copy.to);
    }
  }
}
inline void store_chunk(uint32_t shared, const uint32_t (&word)[4]) {
  std::memcpy(shared_pointer(shared), word, 16);
  written(shared_pointer(shared));
}

inline int32_t float_bits(float v) {
  int32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
// Off by as much as the manual allows, up or down, always the same way for a number.
inline float off_by(float v, float share) {
  return v * (1.0f + (static_cast<uint32_t>(float_bits(v)) * 2654435761u >> 31 ? share : -share));
}
inline float fast_exp2(float x) {
  const float y = off_by(exp2f(x), 0x1p-22f);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float fast_reciprocal(float x) {
  const float y = off_by(1.0f / x, 0x1p-23f);
  return std::fabs(y) < 0x1p-126f ? 0.0f : y;
}
// cvt.pack.sat.u8.s32.b32 d, a, b, c: b in byte 0, a in byte 1, the lower half of c above.
inline uint32_t pack_bytes(const int32_t (&q)[4]) {
  uint32_t all = 0;
  for (int i = 3; i >= 0; --i) all = all << 8 | static_cast<uint32_t>(std::clamp(q[i], 0, 255));
  return all;
}

// ldmatrix.x4.b16: lane i gives the address of row i % 8 of matrix i / 8; of each matrix lane i then holds the two
// 16-bit values 2 * (i % 4) and on of row i / 4.
inline void load_matrices(uint32_t (&m)[4], uint32_t shared) {
  const uint32_t lane = threadIdx.x % 32;
  emulator::exchange<1>({shared}, [&](const uint32_t (&words)[32][6]) {
    for (uint32_t i = 0; i < 4; ++i) {
      std::memcpy(&m[i], shared_pointer(words[8 * i + lane / 4][0]) + 4 * (lane % 4), 4);
    }
  });
}

// mma.m16n8k32 .u8 .s8: with group = lane / 4 and t = lane % 4,
// byte i of A (of 16): row group, plus 8 for i in 4..7 and 12..15; column t * 4 + i % 4, plus 16 from i = 8 on;
// byte i of B (of 8): row t * 4 + i % 4, plus 16 from i = 4 on; column group;
// sum i: row group, plus 8 from i = 2 on; column t * 2 + i % 2.
inline void multiply_add(int32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = threadIdx.x % 32;
  emulator::exchange<6>({a[0], a[1], a[2], a[3], b0, b1}, [&](const uint32_t (&words)[32][6]) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 32; ++k) {
        const int t = k % 16 / 4;
        const uint32_t left = words[row % 8 * 4 + t][(row >= 8 ? 1 : 0) + (k >= 16 ? 2 : 0)];
        const uint32_t right = words[column * 4 + t][4 + (k >= 16 ? 1 : 0)];
        const int activation = left >> 8 * (k % 4) & 255, weight = static_cast<int8_t>(right >> 8 * (k % 4) & 255);
        sum[i] = static_cast<int32_t>(static_cast<uint32_t>(sum[i]) + static_cast<uint32_t>(activation * weight));
      }
    }
  });
}

}  // namespace tile
}  // namespace quant
}  // namespace dfqvit
