// The pybind11 module dfqvit._C: build facts, the choice of the CPU path, and a transformer block as Python's runtime
// calls it. The operators themselves are in libdfqvit_ops, which this module is linked to and which knows no Python.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>

#include "dfqvit/int8_peak.h"
#include "dfqvit/isa.h"
#include "dfqvit/parallel.h"
#include "dfqvit/quant_block.h"

namespace py = pybind11;

namespace {

using dfqvit::quant::Block;
using dfqvit::quant::BlockArguments;
using dfqvit::quant::OptionalTensor;

BlockArguments arguments_of(const py::tuple& a) {
  return {a[0].cast<std::vector<at::Tensor>>(),
          a[1].cast<std::vector<double>>(),
          a[2].cast<std::vector<at::Tensor>>(),
          a[3].cast<std::vector<at::Tensor>>(),
          a[4].cast<std::vector<at::Tensor>>(),
          a[5].cast<std::vector<int64_t>>(),
          a[6].cast<std::vector<at::Tensor>>(),
          a[7].cast<std::vector<at::Tensor>>(),
          a[8].cast<std::vector<int64_t>>(),
          a[9].cast<int64_t>(),
          a[10].cast<double>(),
          a[11].cast<OptionalTensor>(),
          a[12].cast<OptionalTensor>(),
          a[13].cast<OptionalTensor>(),
          a[14].cast<OptionalTensor>(),
          a[15].cast<OptionalTensor>(),
          a[16].cast<std::string>()};
}

// Whether anything would see the call if it went through torch's dispatcher: a trace, a mode, a transform, a profiler.
bool watched() {
  using c10::DispatchKey;
  static const c10::DispatchKeySet watching({DispatchKey::Tracer, DispatchKey::Python, DispatchKey::PythonTLSSnapshot,
                                             DispatchKey::PythonDispatcher, DispatchKey::Functionalize,
                                             DispatchKey::FuncTorchDynamicLayerFrontMode, DispatchKey::FuncTorchBatched,
                                             DispatchKey::FuncTorchVmapMode, DispatchKey::FuncTorchGradWrapper});
  return c10::impl::tls_local_dispatch_key_set().included_.has_any(watching) ||
         c10::impl::TorchDispatchModeTLS::any_modes_set() || at::impl::torch_function_mode_enabled() ||
         at::hasCallbacks();
}

bool plain(const at::Tensor& x) {
  using c10::DispatchKey;
  static const c10::DispatchKeySet usual(
      {DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::ADInplaceOrView, DispatchKey::AutocastCPU});
  const bool strange = (x.key_set() - usual).highestFunctionalityKey() != DispatchKey::Undefined;
  return !strange && x.device().is_cpu() && x.scalar_type() == at::kFloat && x.dim() == 3;
}

// dfqvit::quant_block with constants that were prepared once. It answers only while it knows that the answer is the
// operator's: the modules and tensors that it was made from are still in their places and hold the same values (the
// packed weights apart, which the layer that owns them watches over), no hook waits inside the block, nobody watches,
// and no gradient is wanted. Otherwise it returns None.
class QuantBlock {
 public:
  QuantBlock(const py::tuple& arguments, const std::vector<at::Tensor>& values, const py::list& places,
             const py::list& empty, int64_t channels)
      : QuantBlock(arguments_of(arguments), channels) {
    for (const at::Tensor& value : values) {
      live_.push_back(value);
      held_.push_back(value.detach().clone(at::MemoryFormat::Contiguous));
    }
    for (const py::handle place : places) {
      const auto triple = place.cast<py::tuple>();
      places_.push_back({triple[0].cast<py::dict>(), triple[1], triple[2], Py_TYPE(py::object(triple[2]).ptr())});
    }
    for (const py::handle dict : empty) empty_.push_back(py::reinterpret_borrow<py::dict>(dict));
  }

  // Whether it still is what the modules and tensors say.
  bool current() const { return unchanged(); }

  py::object call(const py::handle& x) const {
    if (!THPVariable_CheckExact(x.ptr())) return py::none();
    const at::Tensor& input = THPVariable_Unpack(x.ptr());
    if (!plain(input) || input.size(2) != channels_ || watched() || !unchanged() || differentiated(input)) {
      return py::none();
    }
    at::Tensor result;
    {
      py::gil_scoped_release release;
      result = block_.run(input);
    }
    return py::cast(result);
  }

 private:
  struct Place {
    py::dict owner;
    py::object key, value;
    PyTypeObject* type;
  };

  QuantBlock(const BlockArguments& a, int64_t channels) : block_(a, true), channels_(channels) {
    for (const auto* tensors : {&a.norms, &a.weights, &a.biases, &a.weight_scales, &a.scales, &a.zeros}) {
      for (const at::Tensor& tensor : *tensors) hold(tensor);
    }
    for (const auto* tensor : {&a.position_bias, &a.mask, &a.index, &a.acm, &a.hidden_scale}) {
      if (*tensor) hold(**tensor);
    }
  }

  // The block reads this tensor's memory, which torch may move: to share it with a process, for one.
  void hold(const at::Tensor& tensor) { memory_.emplace_back(tensor, tensor.const_data_ptr()); }

  bool unchanged() const {
    for (const Place& place : places_) {
      if (PyDict_GetItemWithError(place.owner.ptr(), place.key.ptr()) != place.value.ptr() ||
          Py_TYPE(place.value.ptr()) != place.type) {
        return false;
      }
    }
    for (const py::dict& dict : empty_) {
      if (PyDict_Size(dict.ptr()) != 0) return false;
    }
    for (const auto& [tensor, address] : memory_) {
      if (tensor.const_data_ptr() != address) return false;
    }
    for (size_t i = 0; i < live_.size(); ++i) {
      const at::Tensor &live = live_[i], &held = held_[i];
      if (live.scalar_type() != held.scalar_type() || live.sizes() != held.sizes() || !live.device().is_cpu())
        return false;
      const bool same = live.is_contiguous()
                            ? std::memcmp(live.const_data_ptr(), held.const_data_ptr(), held.nbytes()) == 0
                            : live.equal(held);
      if (!same) return false;
    }
    return true;
  }

  bool differentiated(const at::Tensor& x) const {
    if (!c10::GradMode::is_enabled()) return false;
    if (x.requires_grad()) return true;
    for (const at::Tensor& value : live_) {
      if (value.requires_grad()) return true;
    }
    return false;
  }

  Block block_;
  int64_t channels_;
  std::vector<std::pair<at::Tensor, const void*>> memory_;
  std::vector<at::Tensor> live_, held_;
  std::vector<Place> places_;
  std::vector<py::dict> empty_;
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Compiled part of dfqvit: build facts, the CPU path in use, a block in one call; the operators are linked to it.";
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
  m.def("parallel_threads", &dfqvit::parallel_threads,
        "Threads that share the work of a CPU operator called from here: torch's setting, but no more than the CPUs "
        "allowed.");
  m.def(
      "serial_torch",
      [](const py::function& function, const py::args& arguments, const py::kwargs& named) {
        const dfqvit::SerialTorch serial;
        return function(*arguments, **named);
      },
      "Calls a function; within it torch's own operators have one thread, those of dfqvit as many as before.");
  m.def("lift_serial_torch", &dfqvit::SerialTorch::lift, "Gives torch its threads back, until the next serial_torch.");
  m.def(
      "cpu_quota", [](const std::string& root) { return dfqvit::cpu_quota(root.c_str()); }, py::arg("root") = "",
      "CPUs that the control groups below `root` grant this process, 0 for no limit.");
  m.def("watched", &watched, "Whether a trace, a mode, a transform or a profiler would see calls of operators now.");
  py::class_<QuantBlock>(m, "QuantBlock",
                         "dfqvit::quant_block with prepared constants, for calls that nothing watches; see "
                         "dfqvit/runtime/block.py.")
      .def(py::init<const py::tuple&, const std::vector<at::Tensor>&, const py::list&, const py::list&, int64_t>(),
           py::arg("arguments"), py::arg("values"), py::arg("places"), py::arg("empty"), py::arg("channels"))
      .def("current", &QuantBlock::current, "Whether all that it was made from is still there and as it was.")
      .def("__call__", &QuantBlock::call, py::arg("x"), "float32 [B, T, C] to the same, or None: see the class.");
}
