// Runs a CUDA kernel's own source on the CPU, for tests: the words of the language, and `launch`. Blocks run one after
// the other. The threads of a block are fibers; a warp drawn at random runs as far as it can without the others, so
// that a barrier that is missing shows.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
struct uchar4 {
  uint8_t x, y, z, w;
};
struct int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) {
  return {x, y};
}

using std::isfinite;

inline Index threadIdx, blockIdx, gridDim, blockDim;

namespace emulator {

struct Barrier {
  int size, arrived = 0, generation = 0;
};
struct Copy {
  uint8_t* to;
  const void* from;
  bool there;
};
// What the lanes of a warp show each other.
struct Warp {
  Barrier barrier;
  uint32_t words[32][6];
  std::vector<std::pair<uint64_t, uint64_t>> operands;  // of the wgmmas of its warpgroup, in order (each fourth warp)
};
// A thread's part of a wgmma: where its sums are, and the descriptors of the operands.
struct Product {
  int32_t* sum;
  uint64_t a, b;
};
struct Fiber {
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it goes on: unlike swapcontext, a jump asks nothing of the system
  bool begun = false;
  bool done = false;
  const Barrier* waits_for = nullptr;
  int since = 0;                // the barrier's generation then
  std::function<bool()> until;  // what else it waits for

  bool ready() const { return !done && (!waits_for || waits_for->generation != since) && (!until || until()); }
  std::deque<std::vector<Copy>> groups;  // of copies that are on their way
  std::vector<Copy> open;                // the group not yet committed
  std::vector<uint8_t*> unshown;         // chunks of shared memory that it wrote, and wgmma does not see yet
  std::vector<Product> products, committed;
  size_t newest = 0;          // products of the group that was committed last
  std::vector<int32_t> sums;  // what the registers will hold when the products are waited for
  bool fenced = false;
  bool touched = true;  // shared memory, by ordinary accesses that copies of tiles have not been kept behind
  size_t issued = 0;    // products so far
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Warp> warps;
inline Barrier block;
inline jmp_buf scheduler;
inline std::vector<std::unique_ptr<char[]>> stacks;  // of the fibers, kept from block to block
constexpr size_t kStack = 64 << 10;
inline const std::function<void()>* kernel;

inline Fiber& self() {
  return *fibers[threadIdx.x];
}
inline Warp& my_warp() {
  return warps[threadIdx.x / 32];
}

// From the scheduler to a fiber, until that waits or ends.
[[gnu::noinline]] inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}
// From a fiber to the scheduler, until it is resumed.
[[gnu::noinline]] inline void leave(Fiber& fiber) {
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier) {
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  self().waits_for = &barrier;
  self().since = generation;
  leave(self());
  self().waits_for = nullptr;
}

inline void wait_until(std::function<bool()> condition) {
  if (condition()) return;
  self().until = std::move(condition);
  leave(self());
  self().until = nullptr;
}

inline void enter() {
  (*kernel)();
  if (!self().products.empty() || !self().committed.empty()) std::abort();  // nobody waited for them
  self().done = true;
  _longjmp(scheduler, 1);
}

// Shows `mine` to the other lanes; then `read` sees what all of them showed.
template <int kWords, typename Read>
void exchange(const uint32_t (&mine)[kWords], Read read) {
  Warp& warp = my_warp();
  std::copy(mine, mine + kWords, warp.words[threadIdx.x % 32]);
  wait(warp.barrier);
  read(warp.words);
  wait(warp.barrier);
}

inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  kernel = &body;
  gridDim.x = blocks, blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    block = {static_cast<int>(threads)};
    warps.assign(threads / 32, Warp{{32}, {}, {}});
    fibers.clear();
    for (unsigned i = 0; i < threads; ++i) {
      fibers.push_back(std::make_unique<Fiber>());
      Fiber& fiber = *fibers.back();
      if (stacks.size() <= i) stacks.emplace_back(new char[kStack]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks[i].get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;  // it ends with a jump
      makecontext(&fiber.context, enter, 0);
    }
    static std::mt19937 random(12345);
    std::vector<unsigned> order(threads / 32);
    std::iota(order.begin(), order.end(), 0);
    for (bool left = true; left;) {
      std::shuffle(order.begin(), order.end(), random);
      for (unsigned warp : order) {
        for (bool moved = true; moved;) {
          moved = false;
          for (unsigned i = 32 * warp; i < 32 * warp + 32; ++i) {
            if (!fibers[i]->ready()) continue;
            moved = true;
            threadIdx.x = i;
            resume(*fibers[i]);
          }
        }
      }
      left = std::any_of(fibers.begin(), fibers.end(), [](const auto& fiber) { return !fiber->done; });
      if (left && std::none_of(fibers.begin(), fibers.end(), [](const auto& fiber) { return fiber->ready(); })) {
        std::abort();  // threads wait for others that have left, or wait elsewhere
      }
    }
  }
}

}  // namespace emulator

inline void __syncthreads() {
  emulator::wait(emulator::block);
}
inline void __syncwarp() {
  emulator::wait(emulator::my_warp().barrier);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  uint32_t mine[sizeof(T) / 4];
  std::memcpy(mine, &value, sizeof(T));
  emulator::exchange(mine, [&](const uint32_t (&words)[32][6]) {
    std::memcpy(&value, words[threadIdx.x % 32 ^ distance], sizeof(T));
  });
  return value;
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  static_assert(sizeof(T) == 4, "");
  uint32_t mine[1];
  std::memcpy(mine, &value, 4);
  emulator::exchange(mine, [&](const uint32_t (&words)[32][6]) { std::memcpy(&value, words[lane], 4); });
  return value;
}
inline bool __any_sync(unsigned, bool value) {
  bool any = false;
  emulator::exchange<1>({value ? 1u : 0u}, [&](const uint32_t (&words)[32][6]) {
    for (const auto& lane : words) any |= lane[0] != 0;
  });
  return any;
}
// Byte i of the result is byte `selector >> 4 i & 7` of the eight of b and a.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
// sum plus the products of the signed bytes of a and b.
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return sum;
}
// The same of unsigned ones.
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t sum) {
  for (int i = 0; i < 4; ++i) sum += (a >> 8 * i & 255) * (b >> 8 * i & 255);
  return sum;
}
