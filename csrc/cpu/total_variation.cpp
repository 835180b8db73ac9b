// dfqvit_cpu::total_variation and its backward: one pass over the images each, no temporaries. The order of every sum
// is fixed, so results do not depend on the number of threads.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "dfqvit/build.h"
#include "dfqvit/isa.h"
#include "dfqvit/parallel.h"

namespace dfqvit {
namespace {

constexpr int kDirections = 4;  // across, down, and the two diagonals

inline float squared(float a) {
  return a * a;
}

// sums[d] += the squared differences of each pixel of a row with its neighbour in direction d. `below` is null at the
// end.
inline __attribute__((always_inline)) void row_sums(const float* row, const float* below, int64_t width, double* sums) {
  float across = 0.0f, down = 0.0f, falling = 0.0f, rising = 0.0f;
#pragma omp simd reduction(+ : across)
  for (int64_t i = 0; i < width - 1; ++i) across += squared(row[i] - row[i + 1]);
  sums[0] += across;
  if (below == nullptr) return;
#pragma omp simd reduction(+ : falling, rising, down)
  for (int64_t i = 0; i < width - 1; ++i) {
    down += squared(row[i] - below[i]);
    falling += squared(below[i] - row[i + 1]);
    rising += squared(row[i] - below[i + 1]);
  }
  sums[1] += down + squared(row[width - 1] - below[width - 1]);
  sums[2] += falling;
  sums[3] += rising;
}

// The gradient of one row: weights[d] times the difference with both neighbours in direction d. Null rows are outside.
inline __attribute__((always_inline)) void row_gradient(const float* above, const float* row, const float* below,
                                                        int64_t width, const float* weights, float* gradient) {
  const float w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
  const auto at = [&](int64_t i) {  // any pixel, with every border checked
    float g = 0.0f;
    if (i + 1 < width) g += w0 * (row[i] - row[i + 1]);
    if (i > 0) g += w0 * (row[i] - row[i - 1]);
    if (below) g += w1 * (row[i] - below[i]);
    if (above) g += w1 * (row[i] - above[i]);
    if (above && i + 1 < width) g += w2 * (row[i] - above[i + 1]);
    if (below && i > 0) g += w2 * (row[i] - below[i - 1]);
    if (below && i + 1 < width) g += w3 * (row[i] - below[i + 1]);
    if (above && i > 0) g += w3 * (row[i] - above[i - 1]);
    gradient[i] = g;
  };
  if (!above || !below || width < 3) {
    for (int64_t i = 0; i < width; ++i) at(i);
    return;
  }
  at(0);
#pragma omp simd
  for (int64_t i = 1; i < width - 1; ++i) {
    const float twice = 2.0f * row[i];
    gradient[i] = w0 * (twice - row[i + 1] - row[i - 1]) + w1 * (twice - below[i] - above[i]) +
                  w2 * (twice - above[i + 1] - below[i - 1]) + w3 * (twice - below[i + 1] - above[i - 1]);
  }
  at(width - 1);
}

struct Plane {
  const float* pixels;
  int64_t height, width;
  const float* row(int64_t y) const { return y < 0 || y >= height ? nullptr : pixels + y * width; }
};

inline __attribute__((always_inline)) void plane_sums_body(Plane plane, double* sums) {
  for (int64_t y = 0; y < plane.height; ++y) row_sums(plane.row(y), plane.row(y + 1), plane.width, sums);
}
inline __attribute__((always_inline)) void plane_gradient_body(Plane plane, const float* weights, float* gradient) {
  for (int64_t y = 0; y < plane.height; ++y) {
    row_gradient(plane.row(y - 1), plane.row(y), plane.row(y + 1), plane.width, weights, gradient + y * plane.width);
  }
}

DFQVIT_TARGET_AVX512 void plane_sums_avx512(Plane plane, double* sums) {
  plane_sums_body(plane, sums);
}
DFQVIT_TARGET_AVX2 void plane_sums_avx2(Plane plane, double* sums) {
  plane_sums_body(plane, sums);
}
void plane_sums_portable(Plane plane, double* sums) {
  plane_sums_body(plane, sums);
}
DFQVIT_TARGET_AVX512 void plane_gradient_avx512(Plane plane, const float* weights, float* gradient) {
  plane_gradient_body(plane, weights, gradient);
}
DFQVIT_TARGET_AVX2 void plane_gradient_avx2(Plane plane, const float* weights, float* gradient) {
  plane_gradient_body(plane, weights, gradient);
}
void plane_gradient_portable(Plane plane, const float* weights, float* gradient) {
  plane_gradient_body(plane, weights, gradient);
}

at::Tensor total_variation(const at::Tensor& images) {
  const at::Tensor input = images.to(at::kFloat).contiguous();
  const int64_t batch = input.size(0), channels = input.size(1), height = input.size(2), width = input.size(3);
  at::Tensor norms = at::empty({batch, kDirections}, input.options());
  if (input.numel() == 0) return norms.zero_();
  std::vector<double> sums(batch * channels * kDirections, 0.0);
  const float* data = input.const_data_ptr<float>();
  const auto run = version_for(active_isa(), plane_sums_avx512, plane_sums_avx2, plane_sums_portable);
  parallel_pieces(batch * channels,
                  [&](int64_t p) { run({data + p * height * width, height, width}, sums.data() + p * kDirections); });
  float* result = norms.mutable_data_ptr<float>();
  for (int64_t b = 0; b < batch; ++b) {
    for (int d = 0; d < kDirections; ++d) {
      double total = 0.0;
      for (int64_t c = 0; c < channels; ++c) total += sums[(b * channels + c) * kDirections + d];
      result[b * kDirections + d] = static_cast<float>(std::sqrt(total));
    }
  }
  return norms;
}

at::Tensor total_variation_backward(const at::Tensor& weights, const at::Tensor& images) {
  const at::Tensor input = images.to(at::kFloat).contiguous();
  const at::Tensor factors = weights.contiguous();
  const int64_t channels = input.size(1), height = input.size(2), width = input.size(3);
  at::Tensor gradient = at::empty_like(input);
  const float* data = input.const_data_ptr<float>();
  const float* factor = factors.const_data_ptr<float>();
  float* result = gradient.mutable_data_ptr<float>();
  const auto run = version_for(active_isa(), plane_gradient_avx512, plane_gradient_avx2, plane_gradient_portable);
  if (input.numel() != 0) {
    parallel_pieces(input.size(0) * channels, [&](int64_t p) {
      const int64_t offset = p * height * width;
      run({data + offset, height, width}, factor + p / channels * kDirections, result + offset);
    });
  }
  return gradient.to(images.scalar_type());
}

}  // namespace
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(DFQVIT_OPERATORS(cpu), CPU, m) {
  m.impl("total_variation", &dfqvit::total_variation);
  m.impl("total_variation_backward", &dfqvit::total_variation_backward);
}
