// dfqvit_cpu::quant_attention. Here: the arguments as the kernels want them, and the division of work among threads; the
// kernels are in dfqvit/quant_attention_body.h.
#include "dfqvit/quant_attention.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>

#include "dfqvit/isa.h"
#include "dfqvit/thread_memory.h"

namespace dfqvit {
namespace quant {
namespace {

// The head at `source`, packed into `work`.
Head head_of(const Source& source, const Heads& all, const Workspace& work, const AttentionKernels& kernels) {
  Head head{source.q, source.stride, work.packed};
  if (source.in_place(all)) {
    head.packed.queries = nullptr;
  } else {
    head.queries = work.packed.queries;
    head.query_stride = work.packed.keys.chunks * kDepth;
  }
  kernels.pack(source, all, head.packed);
  head.index = source.index;
  return head;
}

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

  Heads all{};
  all.tokens = tokens;
  all.depth = depth;
  all.factor = static_cast<float>(scale) * s[0] * s[1];
  all.q_zero = static_cast<int32_t>(z[0]);
  all.v_scale = s[2];
  all.v_zero = z[2] - 128;
  all.out_stride = channels;
  bool ordinary = true;
  if (out_scale) {
    const float step = *out_scale->const_data_ptr<float>();
    all.out = {step, 1.0f / step, *out_zero->const_data_ptr<float>(), static_cast<float>((1 << out_bits) - 1)};
    ordinary = ordinary_divisor(step);
  }
  const AttentionKernels kernels = attention_kernels_for(ordinary ? active_isa() : Isa::portable);

  // With few heads and windows each is shared by several threads, which pack it for themselves.
  const int64_t groups = batch * windows * heads, strips = (tokens + kStripRows - 1) / kStripRows;
  const int64_t shares = std::min(strips, std::max<int64_t>(1, 2 * at::get_num_threads() / groups));
  const int64_t rows = (strips + shares - 1) / shares * kStripRows;
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(groups * shares, at::get_num_threads());
  const uint8_t* from = input.const_data_ptr<uint8_t>();
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const Workspace work(all, thread_memory(Workspace::bytes(all)));
    for (int64_t item = next++; item < groups * shares; item = next++) {
      const int64_t begin = item % shares * rows, end = std::min(tokens, begin + rows);
      const int64_t group = item / shares, h = group % heads, w = group / heads % windows, b = group / heads / windows;
      if (begin >= end) continue;
      const Source source{from + b * image * 3 * channels + h * depth, 3 * channels, channels,
                          indices ? indices + w * tokens : nullptr, from + input.numel()};
      const int64_t out = b * image * channels + h * depth;
      Head head = head_of(source, all, work, kernels);
      head.bias = biases ? biases + h * tokens * tokens : nullptr;
      head.mask = masks ? masks + w * tokens * tokens : nullptr;
      if (out_scale) {
        head.out_bytes = result.mutable_data_ptr<uint8_t>() + out;
      } else {
        head.out_floats = result.mutable_data_ptr<float>() + out;
      }
      kernels.attend(head, all, begin, end, work.strip);
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
