// Hopper's copies of whole tiles (TMA): PTX of sm_90 (PTX ISA, "Tensor Copy" and "mbarrier"). One thread names a tile;
// it arrives in shared memory in the swizzle that wgmma reads, zeros where the array ends, and a barrier counts its
// bytes. Shared memory is addressed in 32 bits. tests/kernels/cuda_on_cpu has the same functions for a CPU.
#pragma once

#include <cstdint>

namespace dfqvit {
namespace quant {
namespace tile {

// An array of bytes in rows, as the driver's `cuTensorMapEncodeTiled` describes it: a CUtensorMap.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// A barrier whose phase ends once one thread has arrived and all the bytes that it said are there. By one thread,
// before any use; then `show_barriers`, and a barrier of the block.
__device__ __forceinline__ void make_barrier(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void show_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, for this phase and so many bytes of copies.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of a phase: of the first, third, ... with parity 0, of the others with 1. What was copied is then
// seen by this thread and by its wgmmas.
__device__ __forceinline__ void wait_for_bytes(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni ended;\n"
      "bra.uni again;\n"
      "ended:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// The tile whose first byte is `column` of `row`, in the background.
__device__ __forceinline__ void copy_tile(uint32_t shared, const TensorMap* map, int column, int row,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

}  // namespace tile
}  // namespace quant
}  // namespace dfqvit
