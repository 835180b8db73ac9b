// Stands in for CUDA's header in tests that run a kernel on the CPU: 16 x 16 x 16 products of a warp. Which lane holds
// what is not said by the manual, so no kernel may ask; here lane l holds elements 8 l to 8 l + 7, row by row.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emulator.h"

namespace nvcuda {
namespace wmma {

struct accumulator {};
struct matrix_a {};
struct matrix_b {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

inline float number(float v) {
  return v;
}
inline float number(__half v) {
  return __half2float(v);
}
inline float number(__nv_bfloat16 v) {
  return __bfloat162float(v);
}

template <typename Use, int kM, int kN, int kK, typename T, typename Layout = void>
struct fragment {
  static_assert(kM == 16 && kN == 16 && kK == 16, "");
  float x[8];
};

// What the lanes of each warp show each other: their fragments.
inline const float* shown_a[32][32];
inline const float* shown_b[32][32];

inline void sync() {
  emulator::wait(emulator::my_warp().barrier);
}

template <typename F>
void fill_fragment(F& fragment, float value) {
  std::fill(fragment.x, fragment.x + 8, value);
}

template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* from, unsigned pitch) {
  if (reinterpret_cast<uintptr_t>(from) % 32 != 0 || pitch * sizeof(T) % 16 != 0) std::abort();
  sync();
  for (int i = 0; i < 8; ++i) {
    const int row = (threadIdx.x % 32 * 8 + i) / 16, column = (threadIdx.x % 32 * 8 + i) % 16;
    to.x[i] = number(std::is_same_v<Layout, row_major> ? from[row * pitch + column] : from[column * pitch + row]);
  }
  sync();
}

// sum = a b + c; tensor cores round otherwise, within what a test of half-width products allows.
template <typename A, typename B, typename C>
void mma_sync(C& sum, const A& a, const B& b, const C& c) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  shown_a[warp][lane] = a.x, shown_b[warp][lane] = b.x;
  sync();
  for (int i = 0; i < 8; ++i) {
    const int row = (lane * 8 + i) / 16, column = (lane * 8 + i) % 16;
    float total = c.x[i];
    for (int k = 0; k < 16; ++k) {
      const int left = row * 16 + k, right = k * 16 + column;
      total += shown_a[warp][left / 8][left % 8] * shown_b[warp][right / 8][right % 8];
    }
    sum.x[i] = total;
  }
  sync();
}

template <typename F>
void store_matrix_sync(float* to, const F& from, unsigned pitch, layout_t layout) {
  if (layout != mem_row_major || reinterpret_cast<uintptr_t>(to) % 32 != 0 || pitch % 4 != 0) std::abort();
  sync();
  for (int i = 0; i < 8; ++i) {
    to[(threadIdx.x % 32 * 8 + i) / 16 * pitch + (threadIdx.x % 32 * 8 + i) % 16] = from.x[i];
  }
  sync();
}

}  // namespace wmma
}  // namespace nvcuda
