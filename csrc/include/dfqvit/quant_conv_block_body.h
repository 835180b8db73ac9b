// The body of quant_conv_block's own kernels, compiled once for each CPU path: the includer sets DFQVIT_PATH,
// DFQVIT_SIMD and DFQVIT_TARGET (each_path.h). So no include guard.
//
// The convolution. Channels lie side by side, so a vector holds one pixel of some channels. A tile is up to 8 pixels of
// a row: for every row of taps its weights stay in registers, and each pixel that is read serves all the outputs that
// it reaches. A pixel's sum has the order of the taps, whatever tile it is in; taps beyond the border are left out.

namespace dfqvit {
namespace quant {
namespace DFQVIT_PATH {

#define DFQVIT_INLINE DFQVIT_TARGET inline __attribute__((always_inline))

// `some` of a vector's lanes, where fewer channels are left; the rest is 0.
DFQVIT_INLINE vec load_some(const float* from, int64_t some) {
  if (some >= simd::kLanes) return simd::load(from);
  float lanes[simd::kLanes] = {};
  std::memcpy(lanes, from, some * sizeof(float));
  return simd::load(lanes);
}

DFQVIT_INLINE void store_some(float* to, vec values, int64_t some) {
  if (some >= simd::kLanes) return simd::store(to, values);
  float lanes[simd::kLanes];
  simd::store(lanes, values);
  std::memcpy(to, lanes, some * sizeof(float));
}

// `pixels` outputs from (y, x) on, of the channels from c on, `some` at least one. `taps`: the kernel's size where it
// is known to the compiler, else 0.
template <int pixels, int taps>
DFQVIT_TARGET void tile(const float* image, const Depthwise& conv, int64_t y, int64_t x, int64_t c, int64_t some,
                        float* out) {
  const int64_t channels = conv.channels, size = taps > 0 ? taps : conv.size, reach = size / 2;
  const int64_t first = std::max<int64_t>(y - reach, 0), last = std::min(y + reach, conv.height - 1);
  vec sums[pixels];
  const vec bias = load_some(conv.bias + c, some);
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p) sums[p] = bias;
  for (int64_t row = first; row <= last; ++row) {
    const float* weight = conv.weight + (row - y + reach) * size * channels + c;
    const float* from = image + (row * conv.width + x - reach) * channels + c;
    if constexpr (taps > 0) {
      vec weights[taps];
#pragma GCC unroll 8
      for (int t = 0; t < taps; ++t) weights[t] = load_some(weight + t * channels, some);
#pragma GCC unroll 16
      for (int i = 0; i < pixels + taps - 1; ++i) {
        if (static_cast<uint64_t>(x - reach + i) >= static_cast<uint64_t>(conv.width)) continue;
        const vec value = load_some(from + i * channels, some);
#pragma GCC unroll 8
        for (int p = 0; p < pixels; ++p) {
          if (p <= i && i - p < taps) sums[p] = simd::fma(value, weights[i - p], sums[p]);
        }
      }
    } else {
      for (int64_t t = 0; t < size; ++t) {
        const vec factor = load_some(weight + t * channels, some);
#pragma GCC unroll 8
        for (int p = 0; p < pixels; ++p) {
          if (static_cast<uint64_t>(x - reach + p + t) >= static_cast<uint64_t>(conv.width)) continue;
          sums[p] = simd::fma(load_some(from + (p + t) * channels, some), factor, sums[p]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < pixels; ++p) {
    store_some(out + p * channels + c, sums[p], some);
  }
}

template <int pixels>
DFQVIT_TARGET void tile_of_all_channels(const float* image, const Depthwise& conv, int64_t y, int64_t x, float* out) {
  const int64_t lanes = simd::kLanes, some = std::min(conv.channels, lanes);
  for (int64_t c = 0; c < conv.channels; c += lanes) {
    const int64_t from = std::max<int64_t>(std::min(c, conv.channels - lanes), 0);  // the last may overlap
    if (conv.size == 7 && some == lanes) {
      tile<pixels, 7>(image, conv, y, x, from, lanes, out);
    } else {
      tile<pixels, 0>(image, conv, y, x, from, some, out);
    }
  }
}

// As ConvKernels says.
DFQVIT_TARGET inline void depthwise(const float* image, const Depthwise& conv, int64_t begin, int64_t end, float* out) {
  while (begin < end) {
    const int64_t y = begin / conv.width, x = begin % conv.width, run = std::min(conv.width - x, end - begin);
    const int64_t tiles = (run + 7) / 8, pixels = (run + tiles - 1) / tiles;  // of about the same size
    switch (pixels) {
      case 8:
        tile_of_all_channels<8>(image, conv, y, x, out);
        break;
      case 7:
        tile_of_all_channels<7>(image, conv, y, x, out);
        break;
      case 6:
        tile_of_all_channels<6>(image, conv, y, x, out);
        break;
      case 5:
        tile_of_all_channels<5>(image, conv, y, x, out);
        break;
      case 4:
        tile_of_all_channels<4>(image, conv, y, x, out);
        break;
      case 3:
        tile_of_all_channels<3>(image, conv, y, x, out);
        break;
      case 2:
        tile_of_all_channels<2>(image, conv, y, x, out);
        break;
      default:
        tile_of_all_channels<1>(image, conv, y, x, out);
    }
    begin += pixels;
    out += pixels * conv.channels;
  }
}

// As ConvKernels says.
DFQVIT_TARGET inline void sum_squares(const float* rows, int64_t count, int64_t channels, float* sums) {
  for (int64_t c = 0; c < channels; c += simd::kLanes) {
    const int64_t some = std::min<int64_t>(channels - c, simd::kLanes);
    vec sum = simd::broadcast(0.0f);
    for (int64_t r = 0; r < count; ++r) {
      const vec value = load_some(rows + r * channels + c, some);
      sum = simd::add(sum, simd::mul(value, value));
    }
    store_some(sums + c, sum, some);
  }
}

#undef DFQVIT_INLINE
}  // namespace DFQVIT_PATH
}  // namespace quant
}  // namespace dfqvit
