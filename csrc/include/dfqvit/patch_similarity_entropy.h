// The arithmetic of patch_similarity_entropy that CPU and CUDA share: where the density is taken, and the entropy and
// its derivative from a density. No torch headers. A "set" is one [N, D] group of vectors: an image, or a window of
// one.
#pragma once

#include <cmath>
#include <cstdint>

#include "dfqvit/host_device.h"

namespace dfqvit {
namespace entropy {

constexpr int kTile = 64;                                  // similarities are computed in tiles of kTile x kTile
constexpr double kNormFloor = 1e-8;                        // a shorter vector is divided by this
constexpr double kSmoothing = 1e-4;                        // added to the density
constexpr double kFlatWidth = 16 * 1.1920928955078125e-7;  // a range no wider than this is rounding noise: width 0
constexpr float kCutoff = 13.3f;                           // bandwidths from which the Gaussian is 0 in float32
constexpr double kLog2E = 1.4426950408889634;
constexpr double kInvSqrt2Pi = 0.3989422804014327;

struct Span {
  int32_t begin, end;
};

// The places of the density, evenly spaced from `least` to `greatest`, and the Gaussian around them.
struct Places {
  float least, greatest;
  int32_t points;
  float bandwidth;

  DFQVIT_HOST_DEVICE double step() const { return (static_cast<double>(greatest) - least) / (points - 1); }
  DFQVIT_HOST_DEVICE float place(int32_t j) const { return static_cast<float>(least + step() * j); }
  // The Gaussian is 2^(exponent_scale() (s - place)^2).
  DFQVIT_HOST_DEVICE float exponent_scale() const {
    return static_cast<float>(-0.5 * kLog2E / (static_cast<double>(bandwidth) * bandwidth));
  }
  // 0 for a range of zero width, or one so narrow that no place can be told from another.
  DFQVIT_HOST_DEVICE float inverse_step() const { return step() > 1e-30 ? static_cast<float>(1.0 / step()) : 0.0f; }
  // The places at which similarities in [low, high] have a Gaussian that is not 0.
  DFQVIT_HOST_DEVICE Span span(float low, float high, float inverse_step) const {
    if (inverse_step == 0.0f) return {0, points};
    const float begin = ceilf((low - kCutoff * bandwidth - least) * inverse_step - 1e-3f);
    const float end = floorf((high + kCutoff * bandwidth - least) * inverse_step + 1e-3f) + 1.0f;
    return {begin > 0.0f ? (begin < points ? static_cast<int32_t>(begin) : points) : 0,
            end < points ? (end > 0.0f ? static_cast<int32_t>(end) : 0) : points};
  }
  // Weight of place j in the trapezoid rule.
  DFQVIT_HOST_DEVICE double weight(int32_t j) const { return (j == 0 || j == points - 1 ? 0.5 : 1.0) * step(); }
};

// The smoothed density from the sum of Gaussians over `pairs` similarities.
DFQVIT_HOST_DEVICE double smoothed_density(double sum, double pairs, double bandwidth) {
  return sum * (kInvSqrt2Pi / bandwidth) / pairs + kSmoothing;
}

// What place j adds to the entropy.
DFQVIT_HOST_DEVICE double entropy_term(const Places& places, int32_t j, double density) {
  return -places.weight(j) * density * log(density);
}

// The factor c_j in dloss/ds = sum_j c_j (s - x_j) 2^(exponent_scale (s - x_j)^2), for both orders of a pair together.
DFQVIT_HOST_DEVICE double slope_factor(const Places& places, int32_t j, double density, double grad, double pairs) {
  const double h = places.bandwidth;
  return 2.0 * grad * places.weight(j) * (log(density) + 1.0) * (kInvSqrt2Pi / h) / (pairs * h * h);
}

}  // namespace entropy
}  // namespace dfqvit
