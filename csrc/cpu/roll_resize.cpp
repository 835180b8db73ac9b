// dfqvit_cpu::roll_resize and its backward: the crop, resize, roll and flip of a synthesis step as one separable
// interpolation. Each plane (one channel of one image) is one thread's, so the order of every sum is fixed.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "dfqvit/build.h"
#include "dfqvit/isa.h"
#include "dfqvit/parallel.h"

namespace dfqvit {
namespace {

// Where one output row (or column) comes from: (1 - weight) * input[first] + weight * input[second].
struct Taps {
  std::vector<int32_t> first, second;
  std::vector<float> weight;

  // `positions` are in the rolled image, whose index i is the input's (i + shift) mod size.
  Taps(const float* positions, int64_t count, int64_t size, int64_t shift)
      : first(count), second(count), weight(count) {
    for (int64_t i = 0; i < count; ++i) {
      const float place = std::clamp(positions[i], 0.0f, static_cast<float>(size - 1));
      const float below = std::floor(place);
      const int64_t lower = static_cast<int64_t>(below);
      first[i] = wrapped(lower + shift, size);
      second[i] = wrapped(std::min(lower + 1, size - 1) + shift, size);
      weight[i] = place - below;
    }
  }

  static int32_t wrapped(int64_t index, int64_t size) { return static_cast<int32_t>((index % size + size) % size); }
};

inline __attribute__((always_inline)) void forward_body(const float* input, int64_t width, const Taps& rows,
                                                        const Taps& columns, float* line, float* output) {
  const int64_t out_height = rows.first.size(), out_width = columns.first.size();
  const int32_t* first = columns.first.data();
  const int32_t* second = columns.second.data();
  const float* weight = columns.weight.data();
  for (int64_t y = 0; y < out_height; ++y) {
    const float* upper = input + rows.first[y] * width;
    const float* lower = input + rows.second[y] * width;
    const float w = rows.weight[y];
    for (int64_t x = 0; x < width; ++x) line[x] = upper[x] + w * (lower[x] - upper[x]);
    float* out = output + y * out_width;
#pragma omp simd
    for (int64_t x = 0; x < out_width; ++x) {
      const float left = line[first[x]];
      out[x] = left + weight[x] * (line[second[x]] - left);
    }
  }
}

inline __attribute__((always_inline)) void backward_body(const float* grad, int64_t width, const Taps& rows,
                                                         const Taps& columns, float* line, float* gradient) {
  const int64_t out_height = rows.first.size(), out_width = columns.first.size();
  for (int64_t y = 0; y < out_height; ++y) {
    const float* g = grad + y * out_width;
    std::fill_n(line, width, 0.0f);
    for (int64_t x = 0; x < out_width; ++x) {
      const float right = columns.weight[x] * g[x];
      line[columns.first[x]] += g[x] - right;
      line[columns.second[x]] += right;
    }
    float* upper = gradient + rows.first[y] * width;
    float* lower = gradient + rows.second[y] * width;
    const float w = rows.weight[y];
    for (int64_t x = 0; x < width; ++x) upper[x] += (1.0f - w) * line[x];
    for (int64_t x = 0; x < width; ++x) lower[x] += w * line[x];
  }
}

#define DFQVIT_PATHS(NAME)                                                                                         \
  DFQVIT_TARGET_AVX512 void NAME##_avx512(const float* from, int64_t width, const Taps& rows, const Taps& columns, \
                                          float* line, float* to) {                                                \
    NAME##_body(from, width, rows, columns, line, to);                                                             \
  }                                                                                                                \
  DFQVIT_TARGET_AVX2 void NAME##_avx2(const float* from, int64_t width, const Taps& rows, const Taps& columns,     \
                                      float* line, float* to) {                                                    \
    NAME##_body(from, width, rows, columns, line, to);                                                             \
  }                                                                                                                \
  void NAME##_portable(const float* from, int64_t width, const Taps& rows, const Taps& columns, float* line,       \
                       float* to) {                                                                                \
    NAME##_body(from, width, rows, columns, line, to);                                                             \
  }                                                                                                                \
  auto NAME##_for(Isa isa) {                                                                                       \
    return version_for(isa, NAME##_avx512, NAME##_avx2, NAME##_portable);                                          \
  }
DFQVIT_PATHS(forward)
DFQVIT_PATHS(backward)
#undef DFQVIT_PATHS

// The taps of every image, one pair (rows, columns) each.
std::vector<std::pair<Taps, Taps>> taps_of(const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& shift,
                                           int64_t height, int64_t width) {
  const at::Tensor y = rows.contiguous(), x = columns.contiguous(), by = shift.contiguous();
  std::vector<std::pair<Taps, Taps>> taps;
  for (int64_t b = 0; b < y.size(0); ++b) {
    const int64_t* offset = by.const_data_ptr<int64_t>() + 2 * b;
    taps.emplace_back(Taps(y.const_data_ptr<float>() + b * y.size(1), y.size(1), height, offset[0]),
                      Taps(x.const_data_ptr<float>() + b * x.size(1), x.size(1), width, offset[1]));
  }
  return taps;
}

at::Tensor roll_resize(const at::Tensor& images, const at::Tensor& rows, const at::Tensor& columns,
                       const at::Tensor& shift) {
  const at::Tensor input = images.to(at::kFloat).contiguous();
  const int64_t batch = input.size(0), channels = input.size(1), height = input.size(2), width = input.size(3);
  const auto taps = taps_of(rows, columns, shift, height, width);
  at::Tensor output = at::empty({batch, channels, rows.size(1), columns.size(1)}, input.options());
  const float* from = input.const_data_ptr<float>();
  float* to = output.mutable_data_ptr<float>();
  const int64_t out_pixels = rows.size(1) * columns.size(1);
  const auto run = forward_for(active_isa());
  parallel_pieces(batch * channels, [&](int64_t p) {
    std::vector<float> line(width);
    const auto& [y, x] = taps[p / channels];
    run(from + p * height * width, width, y, x, line.data(), to + p * out_pixels);
  });
  return output.to(images.scalar_type());
}

at::Tensor roll_resize_backward(const at::Tensor& grad, const at::Tensor& rows, const at::Tensor& columns,
                                const at::Tensor& shift, int64_t height, int64_t width) {
  const at::Tensor input = grad.to(at::kFloat).contiguous();
  const int64_t batch = input.size(0), channels = input.size(1), out_pixels = input.size(2) * input.size(3);
  const auto taps = taps_of(rows, columns, shift, height, width);
  at::Tensor gradient = at::empty({batch, channels, height, width}, input.options());
  const float* from = input.const_data_ptr<float>();
  float* to = gradient.mutable_data_ptr<float>();
  const auto run = backward_for(active_isa());
  parallel_pieces(batch * channels, [&](int64_t p) {
    std::vector<float> line(width);
    float* plane = to + p * height * width;
    std::fill_n(plane, height * width, 0.0f);
    const auto& [y, x] = taps[p / channels];
    run(from + p * out_pixels, width, y, x, line.data(), plane);
  });
  return gradient.to(grad.scalar_type());
}

}  // namespace
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(DFQVIT_OPERATORS(cpu), CPU, m) {
  m.impl("roll_resize", &dfqvit::roll_resize);
  m.impl("roll_resize_backward", &dfqvit::roll_resize_backward);
}
