// All CPU operators as one program, without torch: answers requests on its standard input until that ends.
#include "../../../csrc/cpu/fake_quantize.cpp"
#include "../../../csrc/cpu/gate_quantize.cpp"
#include "../../../csrc/cpu/gate_quantize_kernels.cpp"
#include "../../../csrc/cpu/int8_peak.cpp"
#include "../../../csrc/cpu/isa.cpp"
#include "../../../csrc/cpu/layer_norm_quantize.cpp"
#include "../../../csrc/cpu/layer_norm_quantize_kernels.cpp"
#include "../../../csrc/cpu/parallel.cpp"
#include "../../../csrc/cpu/patch_similarity_entropy.cpp"
#include "../../../csrc/cpu/quant_attention.cpp"
#include "../../../csrc/cpu/quant_attention_kernels.cpp"
#include "../../../csrc/cpu/quant_block.cpp"
#include "../../../csrc/cpu/quant_conv_block.cpp"
#include "../../../csrc/cpu/quant_conv_block_kernels.cpp"
#include "../../../csrc/cpu/quant_linear.cpp"
#include "../../../csrc/cpu/quant_linear_kernels.cpp"
#include "../../../csrc/cpu/quant_linear_layer.cpp"
#include "../../../csrc/cpu/quantize_heads.cpp"
#include "../../../csrc/cpu/quantize_heads_kernels.cpp"
#include "../../../csrc/cpu/remembered_block.cpp"
#include "../../../csrc/cpu/roll_resize.cpp"
#include "../../../csrc/cpu/round_second_order.cpp"
#include "../../../csrc/cpu/total_variation.cpp"
#include "dfqvit/results.h"
#include "tensor.h"

at::Tensor dfqvit::empty_result(at::IntArrayRef sizes, at::ScalarType type) {
  return at::empty(sizes, type);
}

namespace {

at::Tensor nothing() {
  return at::empty({0}, at::kByte);
}
// Its name as bytes.
at::Tensor text(const std::string& value) {
  at::Tensor result = at::empty({static_cast<int64_t>(value.size())}, at::kByte);
  std::memcpy(result.mutable_data_ptr(), value.data(), value.size());
  return result;
}
at::Tensor detected_isa() {
  return text(dfqvit::isa_name(dfqvit::detected_isa()));
}
at::Tensor set_isa(c10::string_view name) {
  dfqvit::set_active_isa(dfqvit::isa_from_name(std::string(name)));
  return nothing();
}
at::Tensor set_threads(int64_t count) {
  at::num_threads = static_cast<int>(count);
  return nothing();
}
at::Tensor has_peak() {
  at::Tensor result = at::empty({1}, at::kByte);
  *result.mutable_data_ptr<uint8_t>() = dfqvit::int8_peak(dfqvit::active_isa()) > 0;
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(test, CPU, m) {
  m.impl("detected_isa", &detected_isa);
  m.impl("set_isa", &set_isa);
  m.impl("set_threads", &set_threads);
  m.impl("has_peak", &has_peak);
}

int main() {
  while (true) {
    const std::string name = stream::text();
    try {
      torch::Library::operators().at(name)();
    } catch (const std::exception& error) {
      std::fputc('E', stdout);
      stream::put(std::string(error.what()));
    }
    std::fflush(stdout);
  }
}
