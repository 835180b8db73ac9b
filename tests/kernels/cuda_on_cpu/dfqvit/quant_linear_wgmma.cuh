// The instructions of csrc/include/dfqvit/quant_linear_wgmma.cuh for a CPU, after the words of the PTX ISA
// ("Asynchronous Warpgroup Level Matrix Instructions"). A product is made at once or as late as it may be, when it is
// waited for: drawn at random. Until then the registers of its sums hold rubbish. It sees of shared memory what was
// shown to it.
#pragma once

#include "dfqvit/quant_linear_ptx.cuh"

namespace dfqvit {
namespace quant {
namespace tile {

constexpr bool kHasWgmma = true;
constexpr int32_t kRubbish = static_cast<int32_t>(0xABABABAB);

inline void show_to_async_proxy() {
  for (const uint8_t* chunk : emulator::self().unshown) std::memcpy(shown + (chunk - memory), chunk, 16);
  emulator::self().unshown.clear();
  emulator::self().touched = false;
}

// 16 bytes of a row of an operand in K-major layout with the 128-byte swizzle: rows of 128 bytes in groups of 8, one
// group every `stride`; then bits 4-6 of the address are exchanged by their XOR with bits 7-9. `start` counts from the
// first chunk, and may stand inside a row. What was written since it was shown is rubbish.
inline const uint8_t* operand_chunk(uint64_t descriptor, uint32_t row, uint32_t chunk) {
  const uint32_t start = (descriptor & 0x3FFF) * 16, stride = (descriptor >> 32 & 0x3FFF) * 16;
  const uint64_t unused = uint64_t{3} << 14 | uint64_t{3} << 30 | uint64_t{7} << 46 | uint64_t{0x3FF} << 52;
  const uint64_t base_offset = descriptor >> 49 & 7, swizzle = descriptor >> 62;
  if (swizzle != 1 || base_offset != 0 || (descriptor & unused) != 0) std::abort();
  uint32_t address = start + row / 8 * stride + row % 8 * 128 + 16 * chunk;
  address ^= (address >> 7 & 7) << 4;
  if (address + 16 > shared_size) std::abort();
  static const std::vector<uint8_t> rubbish(16, 0xAB);
  return std::memcmp(shown + address, memory + address, 16) == 0 ? shown + address : rubbish.data();
}

// sum [64, 128] of s32 in fragments: thread t of the warpgroup, of warp w = t / 32 and lane = t % 32, holds in register
// 4 j + i row 16 w + lane / 4, plus 8 from i = 2 on; column 8 j + lane % 4 * 2 + i % 2.
inline void make(const emulator::Product& product, int32_t* sums) {
  const uint32_t warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  for (uint32_t j = 0; j < 16; ++j) {
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t row = 16 * warp + lane / 4 + (i >= 2 ? 8 : 0), column = 8 * j + lane % 4 * 2 + i % 2;
      int32_t sum = 0;
      for (uint32_t chunk = 0; chunk < 2; ++chunk) {
        const uint8_t* a = operand_chunk(product.a, row, chunk);
        const auto* b = reinterpret_cast<const int8_t*>(operand_chunk(product.b, column, chunk));
        for (int k = 0; k < 16; ++k) sum += a[k] * b[k];
      }
      sums[4 * j + i] = static_cast<int32_t>(static_cast<uint32_t>(sums[4 * j + i]) + static_cast<uint32_t>(sum));
    }
  }
}

inline void group_fence() {
  emulator::self().fenced = true;
}

inline void group_multiply(int32_t (&sum)[16][4], uint64_t a, uint64_t b) {
  static std::mt19937 random(6789);
  emulator::Fiber& fiber = emulator::self();
  // The operands must be those of the other threads of the warpgroup: the first of them wrote them down.
  emulator::Warp& group = emulator::warps[threadIdx.x / 128 * 4];
  const size_t index = fiber.issued++;
  if (index == group.operands.size()) group.operands.emplace_back(a, b);
  if (group.operands[index] != std::make_pair(a, b)) std::abort();
  int32_t* registers = sum[0];
  if (fiber.products.empty() && fiber.committed.empty()) {
    fiber.sums.assign(64, kRubbish);
    if (fiber.fenced) std::copy(registers, registers + 64, fiber.sums.begin());
  } else if (std::any_of(registers, registers + 64, [](int32_t value) { return value != kRubbish; })) {
    std::abort();  // they were written while in use
  }
  std::fill(registers, registers + 64, kRubbish);
  fiber.products.push_back({registers, a, b});
  if (random() % 2) {  // at once, and all before it
    for (auto* products : {&fiber.committed, &fiber.products}) {
      for (emulator::Product& product : *products) {
        if (product.sum) make(product, fiber.sums.data());
        product.sum = nullptr;
      }
    }
  }
}
inline void group_commit() {
  emulator::Fiber& fiber = emulator::self();
  fiber.committed.insert(fiber.committed.end(), fiber.products.begin(), fiber.products.end());
  fiber.newest = fiber.products.size();
  fiber.products.clear();
}
inline void group_wait_for_older() {
  emulator::Fiber& fiber = emulator::self();
  for (size_t i = 0; i + fiber.newest < fiber.committed.size(); ++i) {
    if (fiber.committed[i].sum) make(fiber.committed[i], fiber.sums.data());
    fiber.committed[i].sum = nullptr;
  }
}
inline void group_wait(int32_t (&sum)[16][4]) {
  emulator::Fiber& fiber = emulator::self();
  if (fiber.committed.empty()) return;
  for (const emulator::Product& product : fiber.committed) {
    if (product.sum) make(product, fiber.sums.data());
  }
  fiber.committed.clear();
  fiber.fenced = false;
  fiber.touched = true;  // the epilogue follows
  if (fiber.products.empty()) std::copy(fiber.sums.begin(), fiber.sums.end(), sum[0]);
}

}  // namespace tile
}  // namespace quant
}  // namespace dfqvit
