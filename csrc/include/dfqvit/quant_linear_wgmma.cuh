// Hopper's product of a warpgroup, 4 warps together: PTX of sm_90a (PTX ISA, "Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate Instructions"). Both operands stay in shared memory, where `operand_descriptor` says; the sums
// are in registers, as after 16 x mma.sync, warp w holding rows 16 w and on. It works in the background: between
// `group_multiply` and `group_wait` nothing may touch them. tests/kernels/cuda_on_cpu has the same functions for a CPU.
#pragma once

#include <cstdint>

namespace dfqvit {
namespace quant {
namespace tile {

// Whether this pass of the compiler knows these instructions.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWgmma = false;
#else
constexpr bool kHasWgmma = true;
#endif

// What this thread wrote to shared memory (stores, finished copies) becomes visible to wgmma, which reads through the
// "async proxy"; other threads' share after the next barrier.
__device__ __forceinline__ void show_to_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Accesses to the sums so far come before the products that follow.
__device__ __forceinline__ void group_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// The products since the last call become one group.
__device__ __forceinline__ void group_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

#define DFQVIT_FOUR(j) "+r"(sum[j][0]), "+r"(sum[j][1]), "+r"(sum[j][2]), "+r"(sum[j][3])
#define DFQVIT_SUMS                                                                                               \
  DFQVIT_FOUR(0), DFQVIT_FOUR(1), DFQVIT_FOUR(2), DFQVIT_FOUR(3), DFQVIT_FOUR(4), DFQVIT_FOUR(5), DFQVIT_FOUR(6), \
      DFQVIT_FOUR(7), DFQVIT_FOUR(8), DFQVIT_FOUR(9), DFQVIT_FOUR(10), DFQVIT_FOUR(11), DFQVIT_FOUR(12),          \
      DFQVIT_FOUR(13), DFQVIT_FOUR(14), DFQVIT_FOUR(15)

// sum [64, 128] += a [64, 32] of u8 times b [32, 128] of s8, exact modulo 2^32.
__device__ __forceinline__ void group_multiply(int32_t (&sum)[16][4], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, 1;"
      : DFQVIT_SUMS
      : "l"(a), "l"(b));
}
// Waits for all groups but the newest, whose sums stay in use.
__device__ __forceinline__ void group_wait_for_older() {
  asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}
// Waits for all groups. The sums stand here too, so that the compiler moves no access to them above.
__device__ __forceinline__ void group_wait(int32_t (&sum)[16][4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : DFQVIT_SUMS : : "memory");
}

#undef DFQVIT_SUMS
#undef DFQVIT_FOUR

}  // namespace tile
}  // namespace quant
}  // namespace dfqvit
