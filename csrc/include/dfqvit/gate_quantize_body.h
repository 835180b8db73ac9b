// The body of the gate_quantize kernels, compiled once for each CPU path: the includer sets DFQVIT_PATH, DFQVIT_SIMD
// and DFQVIT_TARGET as for quant_linear_body.h, whose activations and rounding it uses. So no include guard.

namespace dfqvit {
namespace quant {
namespace DFQVIT_PATH {

#define DFQVIT_EACH for (int i = 0; i < n; ++i)

template <Activation kActivation>
DFQVIT_TARGET bool gate_rows(const float* gate, int64_t gate_stride, const float* value, int64_t value_stride,
                             int64_t rows, const Gate& g, uint8_t* out, int64_t out_stride) {
  constexpr int n = 4, kStep = n * simd::kLanes;
  static_assert(kGateStep % kStep == 0, "");
  const vec zero = simd::broadcast(g.zero), greatest = simd::broadcast(g.greatest);
  vec strange = simd::broadcast(0.0f);  // NaN once a value was not finite
  for (int64_t r = 0; r < rows; ++r, gate += gate_stride, value += value_stride, out += out_stride) {
    for (int64_t first = 0; first < g.channels; first += kStep) {
      float rest[2][kStep];
      uint8_t bytes[kStep];
      const int64_t left = g.channels - first;
      const bool whole = left >= kStep;
      if (!whole) {
        std::memset(rest, 0, sizeof(rest));
        std::memcpy(rest[0], gate + first, left * sizeof(float));
        std::memcpy(rest[1], value + first, left * sizeof(float));
      }
      const float *gates = whole ? gate + first : rest[0], *values = whole ? value + first : rest[1];
      uint8_t* to = whole ? out + first : bytes;
      vec y[n], scale[n], reciprocal[n];
      DFQVIT_EACH {
        y[i] = simd::load(gates + i * simd::kLanes);
        strange = simd::add(strange, simd::sub(y[i], y[i]));
      }
      if constexpr (kActivation == Activation::gelu) gelu<n>(y, kGelu);
      if constexpr (kActivation == Activation::gelu_tanh) gelu<n>(y, kGeluTanh);
      if constexpr (kActivation == Activation::swish) swish<n>(y, g.slope);
      DFQVIT_EACH {
        const vec other = simd::load(values + i * simd::kLanes);
        strange = simd::add(strange, simd::sub(other, other));
        y[i] = simd::mul(y[i], other);
        if (g.offset) y[i] = simd::add(y[i], simd::load(g.offset + first + i * simd::kLanes));
        scale[i] = simd::load(g.scale + first + i * simd::kLanes);
        reciprocal[i] = simd::load(g.reciprocal + first + i * simd::kLanes);
      }
      quantize_vectors<n, n, true, 1>(&to, y, scale, reciprocal, &zero, greatest);
      if (!whole) std::memcpy(out + first, bytes, left);
    }
  }
  return !simd::any_nan(strange);
}

// As GateKernel says.
DFQVIT_TARGET inline bool gate_quantize(const float* gate, int64_t gate_stride, const float* value,
                                        int64_t value_stride, int64_t rows, const Gate& g, uint8_t* out,
                                        int64_t out_stride) {
  const auto rows_with = g.activation == Activation::gelu        ? gate_rows<Activation::gelu>
                         : g.activation == Activation::gelu_tanh ? gate_rows<Activation::gelu_tanh>
                         : g.activation == Activation::swish     ? gate_rows<Activation::swish>
                                                                 : gate_rows<Activation::none>;
  return rows_with(gate, gate_stride, value, value_stride, rows, g, out, out_stride);
}

#undef DFQVIT_EACH
}  // namespace DFQVIT_PATH
}  // namespace quant
}  // namespace dfqvit
