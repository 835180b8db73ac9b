// dfqvit_cpu::similarity_range, patch_similarity_entropy and its backward. Here: normalisation, the division of work
// among threads, and what follows from the sums; the tiles are in dfqvit/patch_similarity_entropy_body.h. Memory beyond
// input and output: the normalised vectors in float32, and a few numbers for each tile row. The order of every sum is
// fixed, so results do not depend on the number of threads.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "dfqvit/build.h"
#include "dfqvit/isa.h"
#include "dfqvit/parallel.h"
#include "dfqvit/patch_similarity_entropy_cpu.h"
#include "dfqvit/thread_memory.h"
#include "dfqvit/torch_dispatch.h"

namespace dfqvit {
namespace entropy {
namespace {

constexpr int64_t kSetsForWholeSets = 32;  // from this many sets on, the backward gives each set to one thread

// The normalised vectors of all sets, and their squared lengths: exactly 1, but for vectors shorter than kNormFloor.
class Units {
 public:
  explicit Units(const at::Tensor& features)
      : count_(features.size(0) * features.size(1)),
        n_(features.size(2)),
        depth_(features.size(3)),
        stride_((depth_ + 15) / 16 * 16),
        unit_(at::empty({count_ * n_, stride_}, at::kFloat)),
        diagonal_(count_ * n_),
        inverse_(count_ * n_) {
    const at::Tensor input = features.contiguous();
    DFQVIT_DISPATCH_FLOATS(input.scalar_type(), "patch_similarity_entropy", [&] {
      const scalar_t* data = input.const_data_ptr<scalar_t>();
      parallel_ranges(count_ * n_, std::max<int64_t>(1, 16384 / depth_), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) normalise(data + row * depth_, row);
      });
    });
  }

  int64_t count() const { return count_; }
  int64_t n() const { return n_; }
  int64_t depth() const { return depth_; }
  int64_t stride() const { return stride_; }
  Set set(int64_t index) const { return {unit_.const_data_ptr<float>() + index * n_ * stride_, n_, depth_, stride_}; }
  const float* row(int64_t row) const { return unit_.const_data_ptr<float>() + row * stride_; }
  float diagonal(int64_t row) const { return diagonal_[row]; }
  double inverse(int64_t row) const { return inverse_[row]; }

 private:
  template <typename T>
  void normalise(const T* x, int64_t row) {
    float* unit = unit_.mutable_data_ptr<float>() + row * stride_;
    for (int64_t d = 0; d < depth_; ++d) unit[d] = static_cast<float>(x[d]);
    for (int64_t d = depth_; d < stride_; ++d) unit[d] = 0.0f;
    double part[8] = {};  // so that the additions need not wait for each other
    for (int64_t d = 0; d < stride_; d += 8) {
      for (int l = 0; l < 8; ++l) part[l] += static_cast<double>(unit[d + l]) * unit[d + l];
    }
    const double squares = ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
    const double norm = std::sqrt(squares);
    const double inverse = 1.0 / std::max(norm, kNormFloor);
    for (int64_t d = 0; d < depth_; ++d) unit[d] = static_cast<float>(unit[d] * inverse);
    inverse_[row] = inverse;
    // NaN and Inf (where the check of inputs is off) end up here, and through the diagonal in every result.
    diagonal_[row] = norm >= kNormFloor && std::isfinite(norm) ? 1.0f : static_cast<float>(squares * inverse * inverse);
  }

  int64_t count_, n_, depth_, stride_;
  at::Tensor unit_;
  std::vector<float> diagonal_;
  std::vector<double> inverse_;
};

// work(item, scratch, floats) for every item, on all threads. Each thread has `gradient` floats of its own, the third
// argument.
template <typename Work>
void for_each_item(int64_t items, const Units& units, int64_t points, int64_t gradient, const Work& work) {
  const int64_t panel = units.depth() * kTile, tile = kTile * kTile, lanes = points * 16;  // floats, whole cache lines
  parallel_pieces(items, [&](int64_t item) {
    float* memory = reinterpret_cast<float*>(thread_memory((panel + tile + lanes + gradient) * sizeof(float)));
    Scratch scratch{memory, memory + panel, memory + panel + tile};
    work(item, scratch, memory + panel + tile + lanes);
  });
}

// The places of each layer, and for the backward the slope factors of each image.
class Density {
 public:
  Density(const at::Tensor& value_range, int64_t points, double bandwidth) : points_(points) {
    const at::Tensor ends = value_range.contiguous();
    const float* data = ends.const_data_ptr<float>();
    for (int64_t layer = 0; layer < ends.size(0); ++layer) {
      where_.push_back(
          {data[2 * layer], data[2 * layer + 1], static_cast<int32_t>(points), static_cast<float>(bandwidth)});
      for (int64_t j = 0; j < points; ++j) places_.push_back(where_.back().place(static_cast<int32_t>(j)));
    }
  }

  const Places& where(int64_t layer) const { return where_[layer]; }
  Gaussians gaussians(int64_t layer, const float* factors = nullptr) const {
    const Places& where = where_[layer];
    return {where,        places_.data() + layer * points_, factors,
            where.points, where.exponent_scale(),           where.inverse_step()};
  }

 private:
  int64_t points_;
  std::vector<Places> where_;
  std::vector<float> places_;
};

// The Gaussian of a similarity on the diagonal, around a place.
double gaussian(double s, double place, double bandwidth) {
  const double z = (s - place) / bandwidth;
  return std::exp(-0.5 * z * z);
}

at::Tensor similarity_range(const at::Tensor& features) {
  const int64_t layers = features.size(0), batch = features.size(1);
  at::Tensor ends = at::empty({layers, 2}, features.options().dtype(at::kFloat)).zero_();
  if (batch == 0 || layers == 0) return ends;
  const Units units(features);
  const Kernels& kernels = kernels_for(active_isa());
  const int64_t tiles = units.set(0).tiles();
  std::vector<float> parts(units.count() * tiles * 2);
  for_each_item(units.count() * tiles, units, 0, 0, [&](int64_t item, Scratch& scratch, float*) {
    kernels.range_of_panel(units.set(item / tiles), item % tiles, scratch, parts.data() + 2 * item);
  });
  float* result = ends.mutable_data_ptr<float>();
  for (int64_t layer = 0; layer < layers; ++layer) {
    float least = std::numeric_limits<float>::infinity(), greatest = -least;
    for (int64_t item = layer * batch * tiles; item < (layer + 1) * batch * tiles; ++item) {
      least = std::min(least, parts[2 * item]);
      greatest = std::max(greatest, parts[2 * item + 1]);
    }
    bool poisoned = false;
    for (int64_t row = layer * batch * units.n(); row < (layer + 1) * batch * units.n(); ++row) {
      const float s = units.diagonal(row);
      poisoned |= std::isnan(s);
      least = std::min(least, s);
      greatest = std::max(greatest, s);
    }
    least = std::clamp(least, -1.0f, 1.0f);
    greatest = std::clamp(greatest, -1.0f, 1.0f);
    if (static_cast<double>(greatest) - least <= kFlatWidth) least = greatest;
    if (poisoned) least = greatest = std::numeric_limits<float>::quiet_NaN();
    result[2 * layer] = least;
    result[2 * layer + 1] = greatest;
  }
  return ends;
}

std::tuple<at::Tensor, at::Tensor> patch_similarity_entropy(const at::Tensor& features, const at::Tensor& value_range,
                                                            int64_t points, double bandwidth, int64_t windows) {
  const int64_t layers = features.size(0), sets = features.size(1), images = sets / windows;
  at::Tensor result = at::empty({layers, images}, features.options());
  at::Tensor densities = at::empty({layers, images, points}, features.options().dtype(at::kFloat));
  if (layers * images == 0) return {result, densities};
  const Units units(features);
  const Density density(value_range, points, bandwidth);
  const Kernels& kernels = kernels_for(active_isa());
  const int64_t tiles = units.set(0).tiles(), n = units.n();
  std::vector<double> parts(units.count() * tiles * points);
  for_each_item(units.count() * tiles, units, points, 0, [&](int64_t item, Scratch& scratch, float*) {
    kernels.density_of_panel(units.set(item / tiles), item % tiles, density.gaussians(item / tiles / sets), scratch,
                             parts.data() + item * points);
  });

  std::vector<float> entropies(layers * images);
  float* density_data = densities.mutable_data_ptr<float>();
  parallel_ranges(layers * images, 16, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const Places& where = density.where(image / images);
      const double pairs = static_cast<double>(n) * n * windows;
      double entropy = 0.0;
      for (int32_t j = 0; j < points; ++j) {
        double sum = 0.0;
        for (int64_t item = image * windows * tiles; item < (image + 1) * windows * tiles; ++item) {
          sum += parts[item * points + j];
        }
        int64_t ones = 0;
        for (int64_t row = image * windows * n; row < (image + 1) * windows * n; ++row) {
          if (units.diagonal(row) == 1.0f) {
            ++ones;
          } else {
            sum += gaussian(units.diagonal(row), where.place(j), bandwidth);
          }
        }
        sum += ones * gaussian(1.0, where.place(j), bandwidth);
        const double p = smoothed_density(sum, pairs, bandwidth);
        density_data[image * points + j] = static_cast<float>(p);
        entropy += entropy_term(where, j, p);
      }
      entropies[image] = static_cast<float>(entropy);
    }
  });
  DFQVIT_DISPATCH_FLOATS(result.scalar_type(), "patch_similarity_entropy", [&] {
    scalar_t* data = result.mutable_data_ptr<scalar_t>();
    for (int64_t image = 0; image < layers * images; ++image) data[image] = static_cast<scalar_t>(entropies[image]);
  });
  return {result, densities};
}

// Adds the diagonal to the gradient of a unit vector and takes it back through x / max(|x|, kNormFloor). For a vector
// of length 1 the diagonal is constant; what rounding leaves of it is removed with the rest of the component along u.
template <typename T>
void finish_row(const Units& units, int64_t row, const Gaussians& g, float* grad, T* out) {
  const float* unit = units.row(row);
  const float s = units.diagonal(row);
  const float inverse = static_cast<float>(units.inverse(row));
  float along = 0.0f;
  if (s == 1.0f) {
    float part[16] = {};
    for (int64_t d = 0; d < units.stride(); d += 16) {
      for (int l = 0; l < 16; ++l) part[l] += unit[d + l] * grad[d + l];
    }
    for (float p : part) along += p;
  } else {
    double slope = 0.0;
    for (int32_t j = 0; j < g.points; ++j) {
      slope += g.factors[j] * (static_cast<double>(s) - g.places[j]) * gaussian(s, g.places[j], g.where.bandwidth);
    }
    for (int64_t d = 0; d < units.depth(); ++d) grad[d] += static_cast<float>(slope) * unit[d];
  }
  for (int64_t d = 0; d < units.depth(); ++d) out[d] = static_cast<T>((grad[d] - unit[d] * along) * inverse);
}

at::Tensor patch_similarity_entropy_backward(const at::Tensor& grad, const at::Tensor& features,
                                             const at::Tensor& value_range, const at::Tensor& density, double bandwidth,
                                             int64_t windows) {
  const int64_t layers = features.size(0), sets = features.size(1), images = sets / windows, points = density.size(2);
  at::Tensor result = at::empty_like(features, features.options(), at::MemoryFormat::Contiguous);
  if (result.numel() == 0) return result;
  const Units units(features);
  const Density places(value_range, points, bandwidth);
  const Kernels& kernels = kernels_for(active_isa());
  const int64_t tiles = units.set(0).tiles(), n = units.n(), depth = units.depth(), stride = units.stride();

  const at::Tensor grads = grad.to(at::kFloat).contiguous(), densities = density.contiguous();
  const float* grad_data = grads.const_data_ptr<float>();
  const float* density_data = densities.const_data_ptr<float>();
  std::vector<float> factors(layers * images * points);
  for (int64_t i = 0; i < layers * images * points; ++i) {
    const int64_t image = i / points;
    factors[i] =
        static_cast<float>(slope_factor(places.where(image / images), static_cast<int32_t>(i % points), density_data[i],
                                        grad_data[image], static_cast<double>(n) * n * windows));
  }

  DFQVIT_DISPATCH_FLOATS(features.scalar_type(), "patch_similarity_entropy_backward", [&] {
    scalar_t* out = result.mutable_data_ptr<scalar_t>();
    const auto finish = [&](int64_t first, int64_t rows, const Gaussians& g, float* unit_grad) {
      for (int64_t r = 0; r < rows; ++r) {
        finish_row(units, first + r, g, unit_grad + r * stride, out + (first + r) * depth);
      }
    };
    const auto gaussians = [&](int64_t index) {
      return places.gaussians(index / sets, factors.data() + index / windows * points);
    };
    if (units.count() >= kSetsForWholeSets) {
      for_each_item(units.count(), units, points, n * stride, [&](int64_t index, Scratch& scratch, float* unit_grad) {
        const Gaussians g = gaussians(index);
        kernels.backward_of_set(units.set(index), g, scratch, unit_grad);
        finish(index * n, n, g, unit_grad);
      });
    } else {
      for_each_item(units.count() * tiles, units, points, kTile * stride,
                    [&](int64_t item, Scratch& scratch, float* unit_grad) {
                      const int64_t index = item / tiles, tile = item % tiles;
                      const Set set = units.set(index);
                      const Gaussians g = gaussians(index);
                      kernels.backward_of_rows(set, tile, g, scratch, unit_grad);
                      finish(index * n + tile * kTile, set.tile_size(tile), g, unit_grad);
                    });
    }
  });
  return result;
}

}  // namespace
}  // namespace entropy
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(DFQVIT_OPERATORS(cpu), CPU, m) {
  m.impl("similarity_range", &dfqvit::entropy::similarity_range);
  m.impl("patch_similarity_entropy", &dfqvit::entropy::patch_similarity_entropy);
  m.impl("patch_similarity_entropy_backward", &dfqvit::entropy::patch_similarity_entropy_backward);
}
