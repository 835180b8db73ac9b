// Marks arithmetic that CPU and CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define DFQVIT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DFQVIT_HOST_DEVICE inline __attribute__((always_inline))
#endif
