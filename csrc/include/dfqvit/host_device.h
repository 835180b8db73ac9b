// Marks arithmetic that CPU and CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define DFQVIT_HOST_DEVICE __host__ __device__ __forceinline__
#define DFQVIT_UNROLL _Pragma("unroll")
#define DFQVIT_BLOCK_SHARED __shared__  // a variable of a kernel that the threads of a block share
#else
#define DFQVIT_HOST_DEVICE inline __attribute__((always_inline))
#define DFQVIT_UNROLL
#define DFQVIT_BLOCK_SHARED static  // in the tests' emulator blocks run one after the other
#endif
