// The pybind11 module dfqvit._C: build facts and the choice of the CPU path. Importing it also registers the operators
// that the other sources of this folder implement (TORCH_LIBRARY_IMPL); their schemas stand in
// kernels/<operator>/op.py.
#include <pybind11/pybind11.h>

#include "dfqvit/int8_peak.h"
#include "dfqvit/isa.h"

namespace py = pybind11;

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
}
