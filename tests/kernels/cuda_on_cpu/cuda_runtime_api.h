// Stands for CUDA's own header: the names that dfqvit/*_launch.h declares launches with. Nothing launches here.
#pragma once

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
