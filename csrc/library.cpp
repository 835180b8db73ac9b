// The operators of this shared library as torch sees them. Where Python's dfqvit defined them first
// (kernels/dispatch.py, which also chooses among more backends) nothing is left to do here. Otherwise, as in a C++
// program that only loads this library, they are defined here: dfqvit::<name> runs dfqvit_cpu::<name> or
// dfqvit_cuda::<name>, by its first tensor.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/macros/Macros.h>
#include <torch/library.h>

#include <memory>
#include <string>
#include <vector>

#include "dfqvit/build.h"

namespace dfqvit {
namespace {

const std::string kNamespace = C10_STRINGIZE(DFQVIT_NAMESPACE);

struct Definition {
  const char* schema;  // as kernels/<operator>/op.py has it; a test compares them
  bool cpu, cuda;      // which of them this library implements
};

const Definition kDefinitions[] = {
    {"fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int axis) -> Tensor", true,
     true},
    {"fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, "
     "int axis) -> Tensor",
     true, true},
    {"gate_quantize(Tensor gate, Tensor value, Tensor scale, Tensor zero_point, int bits, str activation) -> Tensor",
     true, false},
    {"layer_norm_quantize(Tensor x, Tensor weight, Tensor bias, float eps, Tensor scale, Tensor zero_point, "
     "int bits) -> Tensor",
     true, false},
    {"similarity_range(Tensor features) -> Tensor", true, true},
    {"patch_similarity_entropy(Tensor features, Tensor value_range, int points, float bandwidth, "
     "int windows) -> (Tensor entropy, Tensor density)",
     true, true},
    {"patch_similarity_entropy_backward(Tensor grad, Tensor features, Tensor value_range, Tensor density, "
     "float bandwidth, int windows) -> Tensor",
     true, true},
    {"quant_attention(Tensor qkv, int heads, Tensor in_scale, Tensor in_zero, float scale, Tensor? bias, "
     "Tensor? mask, Tensor? index, Tensor? out_scale, Tensor? out_zero, int out_bits, "
     "Tensor? head_scale=None) -> Tensor",
     true, true},
    {"quant_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? acm, Tensor x_scale, Tensor x_zero, Tensor w_scale, "
     "int a_bits, int w_bits, str activation, Tensor? residual, Tensor? out_scale, Tensor? out_zero, int out_bits, "
     "str out_dtype, Tensor? w_sums=None) -> Tensor",
     true, true},
    {"quant_block(Tensor x, Tensor[] norms, float[] eps, Tensor[] weights, Tensor[] biases, Tensor[] weight_scales, "
     "int[] w_bits, Tensor[] scales, Tensor[] zeros, int[] a_bits, int heads, float attention_scale, "
     "Tensor? position_bias, Tensor? mask, Tensor? index, Tensor? acm, Tensor? hidden_scale, str activation, "
     "Tensor? head_scale=None, bool post_norm=False, bool half=False, str gate='none', Tensor? rope=None, "
     "Tensor? hidden_table=None) -> Tensor",
     true, false},
    {"quant_conv_block(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor norm_weight, Tensor norm_bias, "
     "float eps, Tensor[] weights, Tensor[] biases, Tensor[] weight_scales, int[] w_bits, Tensor[] scales, "
     "Tensor[] zeros, int[] a_bits, Tensor? hidden_scale, str activation, Tensor? grn_weight=None, "
     "Tensor? grn_bias=None, float grn_eps=1e-06) -> Tensor",
     true, false},
    {"quantize_heads(Tensor q, Tensor k, Tensor v, Tensor in_scale, Tensor in_zero, int bits, Tensor? rope, "
     "bool half) -> Tensor",
     true, false},
    {"roll_resize(Tensor images, Tensor rows, Tensor columns, Tensor shift) -> Tensor", true, false},
    {"roll_resize_backward(Tensor grad, Tensor rows, Tensor columns, Tensor shift, int height, int width) -> Tensor",
     true, false},
    {"round_second_order(Tensor weight, Tensor scale, Tensor inputs, Tensor? outputs, Tensor input_carry, "
     "Tensor? output_carry, Tensor levels, int sweeps) -> Tensor",
     true, false},
    {"total_variation(Tensor images) -> Tensor", true, false},
    {"total_variation_backward(Tensor weights, Tensor images) -> Tensor", true, false},
};

std::string name_of(const char* schema) {
  const std::string text(schema);
  return text.substr(0, text.find('('));
}

const at::Tensor* first_tensor(const torch::jit::Stack& stack, size_t arguments) {
  for (size_t i = stack.size() - arguments; i < stack.size(); ++i) {
    if (stack[i].isTensor()) return &stack[i].toTensor();
  }
  return nullptr;
}

void run_on_its_device(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string name = op.schema().name().substr(kNamespace.size() + 2);  // after "::"
  const at::Tensor* first = first_tensor(*stack, op.schema().arguments().size());
  TORCH_CHECK_VALUE(first != nullptr, name, " was called without a tensor");
  const std::string device = c10::DeviceTypeName(first->device().type(), true);
  const auto found = c10::Dispatcher::singleton().findSchema({kNamespace + "_" + device + "::" + name, ""});
  TORCH_CHECK_VALUE(found.has_value(), name, " has no kernel for tensors on '", device,
                    "' in this library; Python's dfqvit.kernels may have");
  found->callBoxed(stack);
}

bool wants_gradient(const c10::IValue& value) {
  if (value.isTensor()) return value.toTensor().requires_grad();
  if (!value.isTensorList()) return false;
  for (const at::Tensor& tensor : value.toTensorVector()) {
    if (tensor.requires_grad()) return true;
  }
  return false;
}

// What autograd does with an operator that is called as itself: it would cut the gradient unseen.
void refuse_gradient(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  if (c10::GradMode::is_enabled()) {
    for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); ++i) {
      TORCH_CHECK_VALUE(!wants_gradient((*stack)[i]), "a gradient is wanted of the operator ",
                        op.schema().name().substr(kNamespace.size() + 2), ", which has none: use torch.no_grad()");
    }
  }
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

// One library object for all: defined operators live as long as it does.
std::vector<std::unique_ptr<torch::Library>>& libraries() {
  static std::vector<std::unique_ptr<torch::Library>> all;
  return all;
}

void define(const std::string& space, const char* schema, bool choosing) {
  const std::string name = name_of(schema);
  if (c10::Dispatcher::singleton().findSchema({space + "::" + name, ""})) return;
  auto library = std::make_unique<torch::Library>(torch::Library::FRAGMENT, space, std::nullopt, __FILE__, __LINE__);
  library->def(schema, {at::Tag::pt2_compliant_tag});
  if (choosing) {
    library->impl(name.c_str(), torch::dispatch(c10::DispatchKey::CompositeExplicitAutograd,
                                                torch::CppFunction::makeFromBoxedFunction<&run_on_its_device>()));
    const std::string suffix = "_backward";
    if (name.size() < suffix.size() || name.compare(name.size() - suffix.size(), suffix.size(), suffix) != 0) {
      library->impl(name.c_str(), torch::dispatch(c10::DispatchKey::Autograd,
                                                  torch::CppFunction::makeFromBoxedFunction<&refuse_gradient>()));
    }
  }
  libraries().push_back(std::move(library));
}

const bool kDefined = [] {
  for (const Definition& d : kDefinitions) {
    if (d.cpu) define(kNamespace + "_cpu", d.schema, false);
    if (d.cuda && DFQVIT_CUDA) define(kNamespace + "_cuda", d.schema, false);
    define(kNamespace, d.schema, true);
  }
  return true;
}();

}  // namespace
}  // namespace dfqvit
