// The instructions of quant_attention.cuh that quant_linear_ptx.cuh does not have: PTX, from sm_80 on.
// tests/kernels/cuda_on_cpu has the same functions for a CPU.
#pragma once

#include "dfqvit/quant_linear_ptx.cuh"

namespace dfqvit {
namespace quant {
namespace attention {

__device__ __forceinline__ float float_of(int32_t bits) {
  return __int_as_float(bits);
}
// a b + c, rounded once, cut to [0, 1]; 0 for what is no number.
__device__ __forceinline__ float saturated_multiply_add(float a, float b, float c) {
  float y;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(y) : "f"(a), "f"(b), "f"(c));
  return y;
}

// Four matrices of 8 rows of eight 16-bit values, turned over; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_transposed(uint32_t (&m)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared)
               : "memory");
}
// sum [16, 8] += a [16, 32] times b [32, 8], both u8, exact modulo 2^32.
__device__ __forceinline__ void multiply_add_unsigned(int32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                      uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace attention
}  // namespace quant
}  // namespace dfqvit
