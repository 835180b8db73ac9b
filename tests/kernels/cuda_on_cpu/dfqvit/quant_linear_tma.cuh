// The instructions of csrc/include/dfqvit/quant_linear_tma.cuh for a CPU, after the words of the PTX ISA ("Tensor
// Copy", "mbarrier"). A tile is copied at once or as late as it may be, when its barrier is waited for: drawn at
// random. Until then its place holds rubbish. What has arrived wgmma sees, too.
#pragma once

#include <map>

#include "dfqvit/quant_linear_ptx.cuh"

namespace dfqvit {
namespace quant {
namespace tile {

constexpr int kTileRows = 128, kTileBytes = 128 * kTileRows;  // as the launch describes the arrays: boxes of 128 x 128

// In place of the driver's description: where the array is, the bytes of a row, the rows.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};
inline TensorMap described(const uint8_t* data, int row_bytes, int rows) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || row_bytes % 16 != 0) std::abort();
  return {{reinterpret_cast<uintptr_t>(data), static_cast<uint64_t>(row_bytes), static_cast<uint64_t>(rows)}};
}

struct TileCopy {
  uint32_t shared;
  TensorMap map;
  int column, row;
};
struct TileBarrier {
  bool usable = false;
  int missing = 1;               // arrivals of this phase
  int64_t bytes = 0;             // that are expected, less those that have come
  uint32_t phase = 0;            // how many have ended
  std::vector<TileCopy> copies;  // on their way

  void look() {
    if (missing != 0 || bytes != 0) return;
    missing = 1;
    ++phase;
  }
  // The oldest copy arrives: rows of 128 bytes, bits 4-6 of the address exchanged by their XOR with bits 7-9.
  void land() {
    const TileCopy copy = copies.front();
    copies.erase(copies.begin());
    const auto* data = reinterpret_cast<const uint8_t*>(copy.map.opaque[0]);
    const auto row_bytes = static_cast<int>(copy.map.opaque[1]), rows = static_cast<int>(copy.map.opaque[2]);
    for (int row = 0; row < kTileRows; ++row) {
      for (int byte = 0; byte < 128; ++byte) {
        uint32_t address = copy.shared + row * 128 + byte;
        address ^= (address >> 7 & 7) << 4;
        const int64_t y = copy.row + row, x = copy.column + byte;
        memory[address] = shown[address] = y < rows && x < row_bytes ? data[y * row_bytes + x] : 0;
      }
    }
    bytes -= kTileBytes;
    look();
  }
};
inline std::map<uint32_t, TileBarrier> tile_barriers;  // by their address; empty before a kernel

inline TileBarrier& barrier_at(uint32_t address) {
  if (address % 8 != 0 || tile_barriers.count(address) == 0 || !tile_barriers[address].usable) std::abort();
  return tile_barriers[address];
}
inline void make_barrier(uint32_t barrier) {
  if (barrier + 8 > shared_size || !tile_barriers[barrier].copies.empty()) std::abort();
  tile_barriers[barrier] = {};
}
inline void show_barriers() {
  for (auto& [address, barrier] : tile_barriers) barrier.usable = true;
}
inline void expect_bytes(uint32_t barrier, uint32_t bytes) {
  TileBarrier& at = barrier_at(barrier);
  if (at.missing != 1) std::abort();  // one arrival a phase
  at.missing = 0, at.bytes += bytes;
  at.look();
}
inline void wait_for_bytes(uint32_t barrier, uint32_t parity) {
  TileBarrier& at = barrier_at(barrier);
  emulator::wait_until([&at, parity] {
    if (at.phase % 2 == parity && !at.copies.empty()) at.land();
    return at.phase % 2 != parity;
  });
}
inline void copy_tile(uint32_t shared, const TensorMap* map, int column, int row, uint32_t barrier) {
  static std::mt19937 random(97531);
  if (shared % 1024 != 0 || shared + kTileBytes > shared_size) std::abort();
  for (const auto& fiber : emulator::fibers) {
    if (fiber->touched) std::abort();  // what it wrote may come after the copy
  }
  std::memset(memory + shared, 0xAB, kTileBytes);
  std::memset(shown + shared, 0xAB, kTileBytes);
  TileBarrier& at = barrier_at(barrier);
  at.copies.push_back({shared, *map, column, row});
  if (random() % 2) at.land();
}

}  // namespace tile
}  // namespace quant
}  // namespace dfqvit
