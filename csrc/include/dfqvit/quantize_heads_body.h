// The body of the quantize_heads kernels, compiled once for each CPU path: the includer sets DFQVIT_PATH, DFQVIT_SIMD
// and DFQVIT_TARGET as for quant_linear_body.h, whose rounding it uses. So no include guard. The compiler makes vectors
// of the loops of rotation and length; a product and a sum each round, on every path.

namespace dfqvit {
namespace quant {
namespace DFQVIT_PATH {

// y = x * cosine + partner * sine, where a pair's partners are (-second, first).
DFQVIT_TARGET inline void rotate(const float* __restrict x, const float* __restrict sines, int64_t depth, bool half,
                                 float* __restrict y) {
  const float* cosines = sines + depth;
  const int64_t pairs = depth / 2;
  if (half) {
    for (int64_t i = 0; i < pairs; ++i) {
      const float first = x[i], second = x[i + pairs];
      y[i] = first * cosines[i] - second * sines[i];
      y[i + pairs] = second * cosines[i + pairs] + first * sines[i + pairs];
    }
  } else {
    for (int64_t i = 0; i < depth; i += 2) {
      const float first = x[i], second = x[i + 1];
      y[i] = first * cosines[i] - second * sines[i];
      y[i + 1] = second * cosines[i + 1] + first * sines[i + 1];
    }
  }
}

// y = x / max(|x|, 1e-12), as torch's normalize has it; in 16 partial sums whatever the vectors' size.
DFQVIT_TARGET inline void to_unit(const float* __restrict x, int64_t depth, float* __restrict y) {
  float sums[kOutputs] = {};
  const int64_t whole = depth / kOutputs * kOutputs;
  for (int64_t i = 0; i < whole; i += kOutputs) {
    for (int l = 0; l < kOutputs; ++l) sums[l] += x[i + l] * x[i + l];
  }
  for (int64_t i = whole; i < depth; ++i) sums[i - whole] += x[i] * x[i];
  for (int step = kOutputs / 2; step > 0; step /= 2) {
    for (int l = 0; l < step; ++l) sums[l] += sums[l + step];
  }
  const float length = std::max(std::sqrt(sums[0]), 1e-12f), inverse = 1.0f / length;
  for (int64_t i = 0; i < depth; ++i) y[i] = x[i] * inverse;
}

DFQVIT_TARGET inline bool quantize_heads(const TokenHeads& token, const Rotation& rotation, const Quantizer& q,
                                         uint8_t* out, float* line) {
  const int64_t depth = token.depth, columns = token.heads * depth;
  const float* values = token.values;
  if (rotation.sines != nullptr || token.stride != depth || token.unit) {
    for (int64_t h = 0; h < token.heads; ++h) {
      const float* from = token.values + h * token.stride;
      if (token.unit) {
        to_unit(from, depth, line + h * depth);
      } else if (rotation.sines != nullptr) {
        rotate(from, rotation.sines + h * rotation.stride, depth, rotation.half, line + h * depth);
      } else {
        std::memcpy(line + h * depth, from, depth * sizeof(float));
      }
    }
    values = line;
  }
  return quantize_rows(values, 1, columns, q, out, columns);
}

}  // namespace DFQVIT_PATH
}  // namespace quant
}  // namespace dfqvit
