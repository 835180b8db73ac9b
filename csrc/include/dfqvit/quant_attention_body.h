// The body of the quant_attention kernels, compiled once for each CPU path: the includer sets DFQVIT_PATH, DFQVIT_SIMD
// and DFQVIT_TARGET as for quant_linear_body.h, whose products it uses. So no include guard.

namespace dfqvit {
namespace quant {
namespace DFQVIT_PATH {

// sums[r, 16] of Q K^T to scores: factor * (sum - offset) + bias + mask, in rows of `stride` floats from row `first`
// on.
struct Scores {
  const Head& head;
  const Heads& heads;
  float* scores;
  int64_t stride, first;

  DFQVIT_TARGET void operator()(int64_t row, int64_t count, int64_t block, const int32_t* sums) const {
    const int64_t keys = heads.tokens, column = block * kOutputs;
    const int64_t valid = std::min<int64_t>(kOutputs, keys - column);
    const int32_t* offset = head.key_offsets + column;
    const simd::vec factor = simd::broadcast(heads.factor);
    for (int64_t i = 0; i < count; ++i, sums += kOutputs) {
      float* to = scores + (row + i) * stride + column;
      const int64_t place = (first + row + i) * keys + column;
      for (int v = 0; v < kVectors; ++v) {
        const int at = v * simd::kLanes;
        simd::store(to + at, simd::mul(factor, simd::difference(sums + at, offset + at)));
      }
      for (const float* addend : {head.bias, head.mask}) {
        if (addend == nullptr) continue;
        if (valid == kOutputs) {
          for (int at = 0; at < kOutputs; at += simd::kLanes) {
            simd::store(to + at, simd::add(simd::load(to + at), simd::load(addend + place + at)));
          }
        } else {
          for (int64_t j = 0; j < valid; ++j) to[j] += addend[place + j];
        }
      }
      for (int64_t j = valid; j < kOutputs; ++j) to[j] = -std::numeric_limits<float>::infinity();
    }
  }
};

// Rows of scores to rows of whole steps of 1/255 of each row's greatest exponential, and the sum of each row's steps.
DFQVIT_TARGET inline void exponentials(const float* scores, int64_t stride, int64_t rows, uint8_t* steps,
                                       int64_t steps_stride, int32_t* totals) {
  const simd::vec log2e = simd::broadcast(1.44269504f), most = simd::broadcast(255.0f), none = simd::broadcast(0.0f);
  for (int64_t r = 0; r < rows; ++r, scores += stride, steps += steps_stride) {
    simd::vec greatest = simd::load(scores);
    for (int64_t j = simd::kLanes; j < stride; j += simd::kLanes) {
      greatest = simd::max(greatest, simd::load(scores + j));
    }
    const simd::vec top = simd::broadcast(simd::reduce_max(greatest));
    for (int64_t j = 0; j < stride; j += simd::kLanes) {
      const simd::vec power = simd::mul(simd::sub(simd::load(scores + j), top), log2e);
      simd::store_integers(steps + j, simd::mul(simd::exp2_nonpositive(power), most), none, most);
    }
    int32_t total = 0;
    for (int64_t j = 0; j < stride; ++j) total += steps[j];
    totals[r] = total;
    std::memset(steps + stride, 0, steps_stride - stride);
  }
}

// sums[r, 16] of P V to results: v_scale * (sum - v_zero * total) / total, and to integers where asked for.
struct Results {
  const Head& head;
  const Heads& heads;
  const int32_t* totals;
  int64_t first;

  DFQVIT_TARGET void operator()(int64_t row, int64_t count, int64_t block, const int32_t* sums) const {
    const int64_t column = block * kOutputs, valid = std::min<int64_t>(kOutputs, heads.depth - column);
    const simd::vec scale = simd::broadcast(heads.v_scale);
    for (int64_t i = 0; i < count; ++i, sums += kOutputs) {
      const int32_t total = totals[row + i];
      int32_t offset[kOutputs];
      for (int j = 0; j < kOutputs; ++j) offset[j] = heads.v_zero * total;
      const simd::vec divisor = simd::broadcast(static_cast<float>(total));
      const simd::vec inverse = simd::broadcast(1.0f / static_cast<float>(total));
      const int64_t token = head.index ? head.index[first + row + i] : first + row + i;
      const int64_t place = token * heads.out_stride + column;
      simd::vec y[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const int at = v * simd::kLanes;
        y[v] = simd::mul(scale, simd::difference(sums + at, offset + at));
      }
      simd::exact_quotients<kVectors, 1>(y, &divisor, &inverse);
      if (head.out_bytes != nullptr) {
        const simd::vec out_scale = simd::broadcast(heads.out.scale),
                        reciprocal = simd::broadcast(heads.out.reciprocal);
        const simd::vec zero = simd::broadcast(heads.out.zero);
        uint8_t bytes[kOutputs];
        uint8_t* places[kVectors];
        for (int v = 0; v < kVectors; ++v) places[v] = bytes + v * simd::kLanes;
        quantize_vectors<kVectors, 1>(places, y, &out_scale, &reciprocal, &zero, simd::broadcast(heads.out.greatest));
        std::memcpy(head.out_bytes + place, bytes, valid);
      } else {
        float values[kOutputs];
        for (int v = 0; v < kVectors; ++v) simd::store(values + v * simd::kLanes, y[v]);
        std::memcpy(head.out_floats + place, values, valid * sizeof(float));
      }
    }
  }
};

// The query rows begin to end of one head of one window.
DFQVIT_TARGET inline void attend(const Head& head, const Heads& heads, int64_t begin, int64_t end, Strip strip) {
  const int64_t key_blocks = (heads.tokens + kOutputs - 1) / kOutputs, stride = key_blocks * kOutputs;
  for (int64_t first = begin; first < end; first += kStripRows) {
    const int64_t rows = std::min(kStripRows, end - first);
    gemm(head.queries + first * heads.key_chunks * kDepth, heads.key_chunks * kDepth, rows, head.keys, 0, key_blocks,
         nullptr, Scores{head, heads, strip.scores, stride, first});
    exponentials(strip.scores, stride, rows, strip.steps, heads.value_chunks * kDepth, strip.totals);
    gemm(strip.steps, heads.value_chunks * kDepth, rows, head.values, 0, (heads.depth + kOutputs - 1) / kOutputs,
         nullptr, Results{head, heads, strip.totals, first});
  }
}

}  // namespace DFQVIT_PATH
}  // namespace quant
}  // namespace dfqvit
