// dfqvit_cpu::quant_attention. Here: packing a head's keys and values like weights, and the division of work among
// threads; the arithmetic is in dfqvit/quant_attention_body.h. Nothing of size [N, N] is ever in memory.
#include "dfqvit/quant_attention.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <vector>

#include "dfqvit/isa.h"

namespace dfqvit {
namespace quant {
namespace {

int64_t rounded_up(int64_t a, int64_t step) {
  return (a + step - 1) / step * step;
}

// One thread's copy of a head, as the products want it: queries in rows, K and V in the blocks of an 8-bit weight.
class Packed {
 public:
  Packed(int64_t tokens, int64_t depth)
      : tokens_(tokens),
        depth_(depth),
        key_chunks_(rounded_up(depth, kDepth) / kDepth),
        value_chunks_(rounded_up(tokens, kDepth) / kDepth),
        key_blocks_(rounded_up(tokens, kOutputs) / kOutputs),
        value_blocks_(rounded_up(depth, kOutputs) / kOutputs),
        key_stride_(kOutputs + key_chunks_ * kChunk / 4),
        value_stride_(kOutputs + value_chunks_ * kChunk / 4),
        queries_(tokens * key_chunks_ * kDepth),
        keys_(key_blocks_ * key_stride_),
        values_(value_blocks_ * value_stride_),
        offsets_(key_blocks_ * kOutputs),
        scores_(kStripRows * key_blocks_ * kOutputs),
        steps_(kStripRows * value_chunks_ * kDepth),
        totals_(kStripRows) {}

  // Takes q, k and v of one head: `from` is token 0's q, `stride` bytes from token to token, `third` from q to k to v.
  void fill(const uint8_t* from, int64_t stride, int64_t third, const int32_t* index, int32_t q_zero, Head& head) {
    uint8_t* key_bytes = reinterpret_cast<uint8_t*>(keys_.data());
    uint8_t* value_bytes = reinterpret_cast<uint8_t*>(values_.data());
    for (int64_t t = 0; t < tokens_; ++t) {
      const uint8_t* q = from + (index ? index[t] : t) * stride;
      const uint8_t* k = q + third;
      std::memcpy(queries_.data() + t * key_chunks_ * kDepth, q, depth_);
      // Key t is output t % 16 of block t / 16; four of its values stand together.
      uint8_t* to = key_bytes + (t / kOutputs * key_stride_ + kOutputs) * 4 + t % kOutputs * 4;
      int32_t sum = 0;
      for (int64_t d = 0; d < depth_; ++d) sum += static_cast<int32_t>(k[d]) - 128;
      int64_t d = 0;
      for (; d + 4 <= depth_; d += 4) {
        uint32_t four;
        std::memcpy(&four, k + d, 4);
        four ^= 0x80808080u;
        std::memcpy(to + d * kOutputs, &four, 4);
      }
      for (; d < depth_; ++d) to[d / 4 * 4 * kOutputs + d % 4] = k[d] ^ 0x80;
      offsets_[t] = q_zero * sum;
    }
    // Four values of one channel stand together: value t is depth t of every block.
    for (int64_t t = 0; t < tokens_; t += 4) {
      const uint8_t* rows[4];  // past the end the last one again: its probabilities are 0
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t token = std::min(t + i, tokens_ - 1);
        rows[i] = from + (index ? index[token] : token) * stride + 2 * third;
      }
      for (int64_t c = 0; c < depth_; c += kOutputs) {
        uint8_t* to = value_bytes + (c / kOutputs * value_stride_ + kOutputs) * 4 + t * kOutputs;
        interleave(rows, c, std::min<int64_t>(kOutputs, depth_ - c), to);
      }
    }
    head.queries = queries_.data();
    head.keys = {keys_.data(), key_stride_, key_chunks_, 8};
    head.values = {values_.data(), value_stride_, value_chunks_, 8};
    head.key_offsets = offsets_.data();
    head.index = index;
  }

  Strip strip() { return {scores_.data(), steps_.data(), totals_.data()}; }
  int64_t key_chunks() const { return key_chunks_; }
  int64_t value_chunks() const { return value_chunks_; }

 private:
  // Column c + i of four rows to the bytes 4i to 4i + 3, as signed bytes.
  static void interleave(const uint8_t* const* rows, int64_t c, int64_t count, uint8_t* to) {
    uint8_t row[4][kOutputs] = {};
    for (int i = 0; i < 4; ++i) std::memcpy(row[i], rows[i] + c, count);
    uint32_t words[kOutputs];
    for (int i = 0; i < kOutputs; ++i) {
      words[i] = (row[0][i] | row[1][i] << 8 | row[2][i] << 16 | static_cast<uint32_t>(row[3][i]) << 24) ^ 0x80808080u;
    }
    std::memcpy(to, words, sizeof(words));
  }

  int64_t tokens_, depth_, key_chunks_, value_chunks_, key_blocks_, value_blocks_, key_stride_, value_stride_;
  std::vector<uint8_t> queries_;
  std::vector<int32_t> keys_, values_, offsets_;
  std::vector<float> scores_;
  std::vector<uint8_t> steps_;
  std::vector<int32_t> totals_;
};

using Optional = std::optional<at::Tensor>;

const float* data_of(const Optional& tensor, at::Tensor& keep) {
  if (!tensor) return nullptr;
  keep = tensor->contiguous();
  return keep.const_data_ptr<float>();
}

at::Tensor quant_attention(const at::Tensor& qkv, int64_t heads, const at::Tensor& in_scale, const at::Tensor& in_zero,
                           double scale, const Optional& bias, const Optional& mask, const Optional& index,
                           const Optional& out_scale, const Optional& out_zero, int64_t out_bits) {
  const at::Tensor input = qkv.contiguous(), scales = in_scale.contiguous(), zeros = in_zero.contiguous();
  const int64_t batch = input.size(0), image = input.size(1), channels = input.size(2) / 3, depth = channels / heads;
  const int64_t windows = index ? index->size(0) : 1, tokens = index ? index->size(1) : image;
  at::Tensor result = at::empty({batch, image, channels}, input.options().dtype(out_scale ? at::kByte : at::kFloat));
  if (result.numel() == 0) return result;
  at::Tensor keep_bias, keep_mask, places = index ? index->contiguous() : at::Tensor();
  const float *biases = data_of(bias, keep_bias), *masks = data_of(mask, keep_mask);
  const int32_t* indices = index ? places.const_data_ptr<int32_t>() : nullptr;
  const float* s = scales.const_data_ptr<float>();
  const float* z = zeros.const_data_ptr<float>();

  Heads shared{};
  shared.tokens = tokens;
  shared.depth = depth;
  shared.factor = static_cast<float>(scale) * s[0] * s[1];
  shared.v_scale = s[2];
  shared.v_zero = static_cast<int32_t>(z[2]) - 128;
  shared.out_stride = channels;
  bool ordinary = true;
  if (out_scale) {
    const float step = *out_scale->const_data_ptr<float>();
    shared.out = {step, 1.0f / step, *out_zero->const_data_ptr<float>(), static_cast<float>((1 << out_bits) - 1)};
    ordinary = ordinary_divisor(step);
  }
  const Attend attend = attend_for(ordinary ? active_isa() : Isa::portable);

  // With few heads and windows each is shared by several threads, which pack it for themselves.
  const int64_t groups = batch * windows * heads, strips = (tokens + kStripRows - 1) / kStripRows;
  const int64_t shares = std::min(strips, std::max<int64_t>(1, 2 * at::get_num_threads() / groups));
  const int64_t rows = (strips + shares - 1) / shares * kStripRows;
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(groups * shares, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Packed packed(tokens, depth);
    Heads all = shared;
    all.key_chunks = packed.key_chunks();
    all.value_chunks = packed.value_chunks();
    for (int64_t item = next++; item < groups * shares; item = next++) {
      const int64_t begin = item % shares * rows, end = std::min(tokens, begin + rows);
      const int64_t group = item / shares, h = group % heads, w = group / heads % windows, b = group / heads / windows;
      if (begin >= end) continue;
      Head head{};
      const uint8_t* from = input.const_data_ptr<uint8_t>() + b * image * 3 * channels + h * depth;
      packed.fill(from, 3 * channels, channels, indices ? indices + w * tokens : nullptr, static_cast<int32_t>(z[0]),
                  head);
      head.bias = biases ? biases + h * tokens * tokens : nullptr;
      head.mask = masks ? masks + w * tokens * tokens : nullptr;
      const int64_t out = b * image * channels + h * depth;
      if (out_scale) {
        head.out_bytes = result.mutable_data_ptr<uint8_t>() + out;
      } else {
        head.out_floats = result.mutable_data_ptr<float>() + out;
      }
      attend(head, all, begin, end, packed.strip());
    }
  });
  return result;
}

}  // namespace
}  // namespace quant
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(dfqvit_cpu, CPU, m) {
  m.impl("quant_attention", &dfqvit::quant::quant_attention);
}
