// dfqvit_cpu::quant_attention. Here: the arguments as the kernels want them, and the division of work among threads;
// the kernels are in dfqvit/quant_attention_body.h.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "dfqvit/build.h"
#include "dfqvit/layers.h"
#include "dfqvit/parallel.h"
#include "dfqvit/results.h"
#include "dfqvit/thread_memory.h"

namespace dfqvit {
namespace quant {
namespace {

// Detached: what is held keeps its memory when the caller's tensor is given other data.
at::Tensor contiguous(const char* name, const OptionalTensor& tensor, at::ScalarType type) {
  if (!tensor) return at::Tensor();
  TORCH_CHECK_TYPE(tensor->scalar_type() == type, name, " had dtype ", tensor->scalar_type(), "; it must be ", type);
  return tensor->contiguous().detach();
}

}  // namespace

AttentionLayer::AttentionLayer(int64_t heads, const at::Tensor& in_scale, const at::Tensor& in_zero, double scale,
                               const OptionalTensor& bias, const OptionalTensor& mask, const OptionalTensor& index,
                               const OptionalTensor& out_scale, const OptionalTensor& out_zero, int64_t out_bits,
                               const OptionalTensor& head_scale)
    : heads(heads),
      windows(index ? index->size(0) : 1),
      biases(contiguous("bias", bias, at::kFloat)),
      masks(contiguous("mask", mask, at::kFloat)),
      places(contiguous("index", index, at::kInt)),
      factors(contiguous("head_scale", head_scale, at::kFloat)),
      constants{},
      integers(out_scale.has_value()),
      ordinary(true) {
  TORCH_CHECK_VALUE(in_scale.numel() == 3 && in_zero.numel() == 3, "in_scale and in_zero had ", in_scale.numel(),
                    " and ", in_zero.numel(), " values; they must have 3, for q, k and v");
  TORCH_CHECK_VALUE(!factors.defined() || factors.numel() == heads, "head_scale had ",
                    factors.defined() ? factors.numel() : 0, " values; there are ", heads, " heads");
  if (places.defined()) {
    const int32_t* place = places.const_data_ptr<int32_t>();
    int wrong = 0;
    for (int64_t i = 0; i < places.numel(); ++i) wrong |= place[i] < 0 || place[i] >= places.numel();
    TORCH_CHECK_VALUE(!wrong, "index held a token outside 0 to ", places.numel() - 1);
  }
  const at::Tensor scales = in_scale.contiguous(), zeros = in_zero.contiguous();
  const float* s = scales.const_data_ptr<float>();
  const float* z = zeros.const_data_ptr<float>();
  constants.factor = static_cast<float>(scale) * s[0] * s[1];
  constants.q_zero = static_cast<int32_t>(z[0]);
  constants.v_scale = s[2];
  constants.v_zero = z[2] - 128;
  if (integers) {
    const float step = scalar_of("out_scale", *out_scale);
    constants.out = {step, 1.0f / step, scalar_of("out_zero", *out_zero), static_cast<float>((1 << out_bits) - 1)};
    ordinary = ordinary_divisor(step);
  }
}

void AttentionLayer::check_tokens(int64_t image) const {
  const int64_t tokens = places.defined() ? places.size(1) : image, wide = tokens * tokens;
  TORCH_CHECK_VALUE(!places.defined() || places.numel() == image, "index had ", places.defined() ? places.numel() : 0,
                    " tokens; the images have ", image);
  TORCH_CHECK_VALUE(!biases.defined() || biases.numel() == heads * wide, "bias had ",
                    biases.defined() ? biases.numel() : 0, " values; it must be [", heads, ", ", tokens, ", ", tokens,
                    "]");
  TORCH_CHECK_VALUE(!masks.defined() || masks.numel() == windows * wide, "mask had ",
                    masks.defined() ? masks.numel() : 0, " values; it must be [", windows, ", ", tokens, ", ", tokens,
                    "]");
}

Heads AttentionLayer::heads_of(int64_t image, int64_t channels) const {
  Heads all = constants;
  all.tokens = places.defined() ? places.size(1) : image;
  all.depth = channels / heads;
  all.out_stride = channels;
  return all;
}

void AttentionLayer::run(const AttentionKernels& kernels, const Heads& all, const Workspace& work, int64_t head,
                         int64_t window, int64_t begin, int64_t end, const uint8_t* qkv, int64_t stride,
                         const uint8_t* end_of_qkv, void* result) const {
  const int64_t tokens = all.tokens, column = head * all.depth;
  const int32_t* index = places.defined() ? places.const_data_ptr<int32_t>() + window * tokens : nullptr;
  const Source source{qkv + column, stride, stride / 3, index, end_of_qkv};
  Head packed{source.q, source.stride, work.packed};
  if (source.in_place(all)) {
    packed.packed.queries = nullptr;
  } else {
    packed.queries = work.packed.queries;
    packed.query_stride = work.packed.keys.chunks * kDepth;
  }
  packed.bias = biases.defined() ? biases.const_data_ptr<float>() + head * tokens * tokens : nullptr;
  packed.mask = masks.defined() ? masks.const_data_ptr<float>() + window * tokens * tokens : nullptr;
  packed.index = index;
  if (integers) {
    packed.out_bytes = static_cast<uint8_t*>(result) + column;
  } else {
    packed.out_floats = static_cast<float*>(result) + column;
  }
  kernels.pack(source, all, packed.packed);
  Heads own = all;
  if (factors.defined()) own.factor *= factors.const_data_ptr<float>()[head];
  kernels.attend(packed, own, begin, end, work.strip);
}

namespace {

at::Tensor quant_attention(const at::Tensor& qkv, int64_t heads, const at::Tensor& in_scale, const at::Tensor& in_zero,
                           double scale, const OptionalTensor& bias, const OptionalTensor& mask,
                           const OptionalTensor& index, const OptionalTensor& out_scale, const OptionalTensor& out_zero,
                           int64_t out_bits, const OptionalTensor& head_scale) {
  const at::Tensor input = qkv.contiguous();
  const int64_t batch = input.size(0), image = input.size(1), channels = input.size(2) / 3;
  at::Tensor result = empty_result({batch, image, channels}, out_scale ? at::kByte : at::kFloat);
  if (result.numel() == 0) return result;
  const AttentionLayer layer(heads, in_scale, in_zero, scale, bias, mask, index, out_scale, out_zero, out_bits,
                             head_scale);
  const AttentionKernels kernels = attention_kernels_for(layer.ordinary ? active_isa() : Isa::portable);
  layer.check_tokens(image);
  const Heads all = layer.heads_of(image, channels);

  // With few heads and windows each is shared by several threads, which pack it for themselves.
  const int64_t groups = batch * layer.windows * heads, strips = (all.tokens + kStripRows - 1) / kStripRows;
  const int64_t shares = std::min(strips, std::max<int64_t>(1, 2 * parallel_threads() / groups));
  const int64_t rows = (strips + shares - 1) / shares * kStripRows;
  const uint8_t* from = input.const_data_ptr<uint8_t>();
  char* to = static_cast<char*>(result.mutable_data_ptr());
  parallel_pieces(groups * shares, [&](int64_t item) {
    const Workspace work(all, thread_memory(Workspace::bytes(all)));
    const int64_t begin = item % shares * rows, end = std::min(all.tokens, begin + rows), group = item / shares;
    const int64_t b = group / heads / layer.windows * image * channels;
    if (begin >= end) return;
    layer.run(kernels, all, work, group % heads, group / heads % layer.windows, begin, end, from + 3 * b, 3 * channels,
              from + input.numel(), to + b * result.element_size());
  });
  return result;
}

}  // namespace
}  // namespace quant
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(DFQVIT_OPERATORS(cpu), CPU, m) {
  m.impl("quant_attention", &dfqvit::quant::quant_attention);
}
