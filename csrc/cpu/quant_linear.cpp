// dfqvit_cpu::quant_linear. Here: the arguments as the kernels want them, and the division of work among threads; the
// kernels are in dfqvit/quant_linear_body.h. With many rows a thread takes row blocks: it quantizes one into its own
// buffer, small enough for the second cache, and multiplies it with all outputs. With few rows the threads share the
// quantized rows and take outputs.
#include "dfqvit/quant_linear.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <atomic>
#include <vector>

#include "dfqvit/build.h"
#include "dfqvit/layers.h"
#include "dfqvit/parallel.h"
#include "dfqvit/results.h"
#include "dfqvit/thread_memory.h"
#include "dfqvit/torch_dispatch.h"

namespace dfqvit {
namespace quant {
namespace {

constexpr int64_t kBufferBytes = 1 << 19;  // of quantized rows a thread works on
constexpr size_t kStreamBytes = 8 << 20;   // from this size on a float32 result is written past the caches
constexpr int64_t kLeastRows = 64, kMostRows = 1024;
constexpr int64_t kLeastProducts = 1 << 21;  // below it other threads would come too late to help

// A large result of its own pages costs more in page faults than in arithmetic: huge pages, where the system grants
// them.
void ask_for_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 1 << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) + tensor.nbytes()) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

// The input: floats to be quantized, or the integers.
struct Input {
  const at::Tensor tensor;
  Type type;
  int64_t rows, columns, stride;  // stride: bytes from row to row once quantized and padded
  Quantizer quantizer;
  const Kernels& kernels;

  bool ready() const { return type == Type::u8 && columns == stride; }
  const uint8_t* row(int64_t r) const {
    return static_cast<const uint8_t*>(tensor.const_data_ptr()) + r * columns * tensor.element_size();
  }
  // Rows [begin, end) as padded integers at `out`; false when one was not finite.
  bool prepare(int64_t begin, int64_t end, uint8_t* out) const {
    if (type != Type::u8) return kernels.quantize(row(begin), type, end - begin, columns, quantizer, out, stride);
    for (int64_t r = begin; r < end; ++r, out += stride) {
      std::memcpy(out, row(r), columns);
      std::memset(out + columns, 0, stride - columns);
    }
    return true;
  }
};

// All the rows times all the outputs. False when a value of x was not finite.
bool run(const Input& input, const Weight& weight, Epilogue e, int64_t blocks) {
  std::atomic<bool> finite{true};
  const int64_t rows = input.rows, products = rows * blocks * weight.chunks * kChunk;
  const int64_t threads = products < kLeastProducts ? 1 : parallel_threads();
  const int64_t depth = std::max<int64_t>(input.stride, 1);
  if (rows >= threads * 2 * kLeastRows || threads == 1) {
    const int64_t share = (rows + threads - 1) / threads;  // of a thread,
    const int64_t most = input.ready() ? share : std::clamp(kBufferBytes / depth / 32 * 32, kLeastRows, kMostRows);
    const int64_t parts = (share + most - 1) / most;                    // in so many row blocks,
    const int64_t size = ((share + parts - 1) / parts + 31) / 32 * 32;  // of whole tiles
    parallel_pieces((rows + size - 1) / size, [&](int64_t part) {
      const int64_t first = part * size, last = std::min(first + size, rows);
      const int64_t buffer = input.ready() ? 0 : size * input.stride;
      uint8_t* scratch = thread_memory(buffer + weight.scratch_bytes(blocks));
      const uint8_t* a = input.ready() ? input.row(first) : scratch;
      if (!input.ready() && !input.prepare(first, last, scratch)) finite = false;
      Epilogue mine = e;
      mine.first_row = first;
      input.kernels.linear(a, input.stride, last - first, weight, 0, blocks, scratch + buffer, mine);
    });
    return finite;
  }
  at::Tensor shared;
  uint8_t* integers = nullptr;
  if (!input.ready()) {
    shared = empty_result({std::max<int64_t>(rows * input.stride, 1)}, at::kByte);
    integers = shared.mutable_data_ptr<uint8_t>();
  }
  e.first_row = 0;
  // First the rows are quantized, by parts; then each piece takes some pairs of blocks, as soon as all rows are there.
  const int64_t part = std::max<int64_t>((1 << 14) / depth, (rows + threads - 1) / threads);
  const int64_t parts = input.ready() ? 0 : (rows + part - 1) / part;
  const int64_t pairs = (blocks + 1) / 2, some = (pairs + 2 * threads - 1) / (2 * threads);
  Countdown prepared(parts);
  parallel_pieces(parts + (pairs + some - 1) / some, [&](int64_t piece) {
    if (piece < parts) {
      const Countdown::Piece counted(prepared);
      const int64_t first = piece * part;
      if (!input.prepare(first, std::min(rows, first + part), integers + first * input.stride)) finite = false;
      return;
    }
    prepared.wait();
    const int64_t begin = 2 * some * (piece - parts), end = std::min(begin + 2 * some, blocks);
    uint8_t* scratch = thread_memory(weight.scratch_bytes(end - begin));
    input.kernels.linear(integers ? integers : input.row(0), input.stride, rows, weight, begin, end, scratch, e);
  });
  return finite;
}

at::Tensor quant_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& acm, const at::Tensor& x_scale, const at::Tensor& x_zero,
                        const at::Tensor& w_scale, int64_t a_bits, int64_t w_bits, c10::string_view activation,
                        const OptionalTensor& residual, const OptionalTensor& out_scale, const OptionalTensor& out_zero,
                        int64_t out_bits, c10::string_view out_type,
                        const OptionalTensor&) {  // the blocked weight has its sums in it
  const int64_t columns = x.size(-1);
  const at::ScalarType out_dtype = dtype_named(out_type);
  const LinearLayer layer(weight, bias, acm, x_scale, x_zero, w_scale, columns, a_bits, w_bits, activation, out_scale,
                          out_zero, out_bits, out_dtype);
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  TORCH_CHECK_VALUE(rows % layer.epilogue.tokens == 0, "acm was for ", layer.epilogue.tokens, " tokens; the ", rows,
                    " rows of x are not a multiple of that");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = layer.out_features;

  const Kernels kernels = kernels_for(layer.ordinary ? active_isa() : Isa::portable);
  const Input input{x.contiguous(), type_of(x.scalar_type()), rows, columns, layer.stride(), layer.input, kernels};
  if (input.type == Type::u8 && a_bits < 8) {
    uint8_t most = 0;
    for (int64_t i = 0; i < rows * columns; ++i) most = std::max(most, input.row(0)[i]);
    TORCH_CHECK_VALUE(most < 1 << a_bits, "x held ", static_cast<int>(most), "; it must be a whole number from 0 to ",
                      (1 << a_bits) - 1);
  }
  at::Tensor result = empty_result(shape, out_dtype);
  ask_for_huge_pages(result);
  TORCH_CHECK_VALUE(!residual || residual->numel() == rows * layer.out_features, "residual had shape ",
                    residual ? residual->sizes() : at::IntArrayRef(), "; the result has ", at::IntArrayRef(shape));
  if (out_scale) check_finite("residual", residual);
  const at::Tensor addend = residual ? residual->contiguous() : at::Tensor();
  Epilogue e = layer.epilogue;
  e.columns = layer.columns.data();
  e.residual = residual ? addend.const_data_ptr() : nullptr;
  e.residual_type = residual ? type_of(addend.scalar_type()) : Type::f32;
  e.out = result.mutable_data_ptr();
  e.stream = e.type == Type::f32 && result.nbytes() >= kStreamBytes && layer.out_features % kOutputs == 0 &&
             reinterpret_cast<uintptr_t>(e.out) % 64 == 0;
  if (result.numel() > 0) {
    TORCH_CHECK_VALUE(run(input, layer.weight, e, layer.count()), "x held NaN or Inf; every value must be finite");
  }
  return result;
}

}  // namespace
}  // namespace quant
}  // namespace dfqvit

TORCH_LIBRARY_IMPL(DFQVIT_OPERATORS(cpu), CPU, m) {
  m.impl("quant_linear", &dfqvit::quant::quant_linear);
}
