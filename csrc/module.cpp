// The pybind11 module dfqvit._C: build facts and the choice of the CPU path. Importing it also registers the operators
// that the other sources of this folder implement (TORCH_LIBRARY_IMPL); their schemas stand in
// kernels/<operator>/op.py.
#include <torch/csrc/utils/pybind.h>

#include "dfqvit/int8_peak.h"
#include "dfqvit/isa.h"
#include "dfqvit/quant_block.h"

namespace py = pybind11;

namespace {

using dfqvit::quant::AttentionLayer;
using dfqvit::quant::Block;
using dfqvit::quant::LinearLayer;
using dfqvit::quant::NormLayer;
using dfqvit::quant::OptionalTensor;

at::Tensor tensor(const py::tuple& arguments, size_t i) {
  return arguments[i].cast<at::Tensor>();
}
OptionalTensor optional(const py::tuple& arguments, size_t i) {
  return arguments[i].is_none() ? OptionalTensor() : OptionalTensor(tensor(arguments, i));
}
int64_t whole(const py::tuple& arguments, size_t i) {
  return arguments[i].cast<int64_t>();
}

// The operators' arguments in the order of their schemas (kernels/<operator>/op.py), without the input and residual.
NormLayer norm(const py::tuple& a) {
  return {tensor(a, 0), tensor(a, 1), a[2].cast<double>(), tensor(a, 3), tensor(a, 4), whole(a, 5)};
}
LinearLayer linear(const py::tuple& a, int64_t in_features) {
  const std::string activation = a[8].cast<std::string>();
  const OptionalTensor out_scale = optional(a, 9);
  return {tensor(a, 0),   optional(a, 1),
          optional(a, 2), tensor(a, 3),
          tensor(a, 4),   tensor(a, 5),
          in_features,    whole(a, 6),
          whole(a, 7),    activation,
          out_scale,      optional(a, 10),
          whole(a, 11),   out_scale ? at::kByte : at::kFloat};
}
AttentionLayer attention(const py::tuple& a) {
  return {whole(a, 0),    tensor(a, 1),   tensor(a, 2),   a[3].cast<double>(), optional(a, 4),
          optional(a, 5), optional(a, 6), optional(a, 7), optional(a, 8),      whole(a, 9)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of dfqvit: build facts, the CPU path in use, and the registered operators.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = DFQVIT_TORCH_VERSION;
        info["cuda"] = static_cast<bool>(DFQVIT_CUDA);
        info["cuda_archs"] = DFQVIT_CUDA_ARCHS;
        info["compiler"] = __VERSION__;
        return info;
      },
      "What this module was built with: torch, cuda, cuda_archs, compiler.");
  m.def(
      "detected_isa", [] { return dfqvit::isa_name(dfqvit::detected_isa()); },
      "The best CPU path that this processor can run: 'portable', 'avx2', 'avx512' or 'amx'.");
  m.def("active_isa", [] { return dfqvit::isa_name(dfqvit::active_isa()); }, "The CPU path in use.");
  m.def(
      "set_isa", [](const std::string& name) { dfqvit::set_active_isa(dfqvit::isa_from_name(name)); }, py::arg("name"),
      "Uses the CPU path `name` from now on; ValueError when it is unknown or this processor lacks it.");
  m.def(
      "int8_peak", [] { return dfqvit::int8_peak(dfqvit::active_isa()); },
      "Multiply-adds of bytes a second of one core on the CPU path in use, measured; 0 where it has no instruction for "
      "them.");
  py::class_<Block>(
      m, "QuantBlock",
      "A transformer block in one call; see dfqvit/quant_block.h and dfqvit/chain.py. Takes the arguments "
      "of its seven operators, each a tuple in the order of its schema without the input and residual.")
      .def(py::init([](const py::tuple& norm1, const py::tuple& qkv, const py::tuple& attend, const py::tuple& proj,
                       const py::tuple& norm2, const py::tuple& fc1, const py::tuple& fc2) {
        const int64_t channels = tensor(norm1, 0).numel();
        const auto outputs = [](const py::tuple& a) { return tensor(a, 5).numel(); };
        return Block(norm(norm1), linear(qkv, channels), attention(attend), linear(proj, outputs(qkv) / 3), norm(norm2),
                     linear(fc1, channels), linear(fc2, outputs(fc1)));
      }))
      .def("__call__", &Block::run, py::arg("x"), py::call_guard<py::gil_scoped_release>(),
           "float32 [B, T, C] to the same.");
}
