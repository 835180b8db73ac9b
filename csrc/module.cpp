// The pybind11 module dfqvit._C: build facts, the choice of the CPU path, and a transformer block as Python's runtime
// calls it. The operators themselves are in libdfqvit_ops, which this module is linked to and which knows no Python.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "dfqvit/gather.h"
#include "dfqvit/int8_peak.h"
#include "dfqvit/isa.h"
#include "dfqvit/parallel.h"
#include "dfqvit/quant_block.h"
#include "dfqvit/quant_conv_block.h"
#include "dfqvit/results.h"

namespace py = pybind11;

namespace {

using dfqvit::quant::Block;
using dfqvit::quant::BlockArguments;
using dfqvit::quant::ConvBlock;
using dfqvit::quant::ConvBlockArguments;
using dfqvit::quant::OptionalTensor;

Block block_of(const py::tuple& a) {
  const BlockArguments arguments{a[0].cast<std::vector<at::Tensor>>(),
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
                                 a[16].cast<std::string>(),
                                 a[17].cast<OptionalTensor>(),
                                 a[18].cast<bool>(),
                                 a[19].cast<bool>(),
                                 a[20].cast<std::string>(),
                                 !a[21].is_none(),
                                 a[22].cast<OptionalTensor>()};
  return Block(arguments, true);
}

ConvBlock conv_block_of(const py::tuple& a) {
  return ConvBlock(
      {a[0].cast<at::Tensor>(), a[1].cast<OptionalTensor>(), a[2].cast<at::Tensor>(), a[3].cast<at::Tensor>(),
       a[4].cast<double>(), a[5].cast<std::vector<at::Tensor>>(), a[6].cast<std::vector<at::Tensor>>(),
       a[7].cast<std::vector<at::Tensor>>(), a[8].cast<std::vector<int64_t>>(), a[9].cast<std::vector<at::Tensor>>(),
       a[10].cast<std::vector<at::Tensor>>(), a[11].cast<std::vector<int64_t>>(), a[12].cast<OptionalTensor>(),
       a[13].cast<std::string>(), a[14].cast<OptionalTensor>(), a[15].cast<OptionalTensor>(), a[16].cast<double>()});
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

bool usual(const at::Tensor& x) {
  using c10::DispatchKey;
  static const c10::DispatchKeySet known(
      {DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::ADInplaceOrView, DispatchKey::AutocastCPU});
  return (x.key_set() - known).highestFunctionalityKey() == DispatchKey::Undefined && x.device().is_cpu();
}

// Whether what was computed once from modules and tensors still holds for a call: the modules and tensors are in their
// places and hold the same values (packed weights apart, which are large: of them torch's count of writes is compared),
// no hook waits inside, no forward was replaced, nobody watches, and no gradient is wanted.
class Watch {
 public:
  Watch(const std::vector<at::Tensor>& values, const std::vector<at::Tensor>& packed, const py::list& places,
        const py::list& empty, const py::list& absent, int64_t channels, int64_t dims)
      : channels_(channels), dims_(dims) {
    for (const at::Tensor& tensor : packed) packed_.emplace_back(tensor, tensor._version());
    for (const at::Tensor& value : values) {
      live_.push_back(value);
      held_.push_back(value.detach().clone(at::MemoryFormat::Contiguous));
    }
    for (const py::handle place : places) {
      const auto triple = place.cast<py::tuple>();
      places_.push_back({triple[0].cast<py::dict>(), triple[1], triple[2], Py_TYPE(py::object(triple[2]).ptr())});
    }
    for (const py::handle dict : empty) empty_.push_back(py::reinterpret_borrow<py::dict>(dict));
    for (const py::handle pair : absent) {
      const auto both = pair.cast<py::tuple>();
      absent_.emplace_back(both[0].cast<py::dict>(), both[1]);
    }
  }

  // For Python's collector: it may hold the very dict that holds it.
  int visit(visitproc visit, void* arg) const {
    for (const Place& place : places_) {
      for (const py::object* each : {static_cast<const py::object*>(&place.owner), &place.key, &place.value}) {
        Py_VISIT(each->ptr());
      }
    }
    for (const py::dict& dict : empty_) Py_VISIT(dict.ptr());
    for (const auto& [dict, key] : absent_) {
      Py_VISIT(dict.ptr());
      Py_VISIT(key.ptr());
    }
    return 0;
  }
  void clear() {
    cleared_ = true;
    const auto places = std::move(places_);
    const auto empty = std::move(empty_);
    const auto absent = std::move(absent_);
  }

  // Whether all that it was made from is still there and as it was.
  bool current() const {
    if (cleared_) return false;
    for (const Place& place : places_) {
      if (PyDict_GetItemWithError(place.owner.ptr(), place.key.ptr()) != place.value.ptr() ||
          Py_TYPE(place.value.ptr()) != place.type) {
        return false;
      }
    }
    for (const py::dict& dict : empty_) {
      if (PyDict_Size(dict.ptr()) != 0) return false;
    }
    for (const auto& [dict, key] : absent_) {
      if (PyDict_GetItemWithError(dict.ptr(), key.ptr()) != nullptr) return false;
    }
    for (const auto& [tensor, version] : packed_) {
      if (tensor._version() != version) return false;
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

  // Whether it holds for a call with x, float32 [..., C] of `dims` dimensions, and with other tensors.
  bool holds(const py::handle& x, const py::args& others) const {
    if (!THPVariable_CheckExact(x.ptr())) return false;
    const at::Tensor& input = THPVariable_Unpack(x.ptr());
    if (!usual(input) || input.scalar_type() != at::kFloat || input.dim() != dims_ || input.size(-1) != channels_)
      return false;
    const bool gradients = c10::GradMode::is_enabled();
    if (gradients && input.requires_grad()) return false;
    for (const py::handle other : others) {
      if (other.is_none()) continue;
      if (!THPVariable_Check(other.ptr())) return false;
      const at::Tensor& tensor = THPVariable_Unpack(other.ptr());
      if (!usual(tensor) || (gradients && tensor.requires_grad())) return false;
    }
    if (watched() || !current()) return false;
    if (gradients) {
      for (const at::Tensor& value : live_) {
        if (value.requires_grad()) return false;
      }
    }
    return true;
  }

 private:
  struct Place {
    py::dict owner;
    py::object key, value;
    PyTypeObject* type;
  };

  bool cleared_ = false;
  int64_t channels_, dims_;
  std::vector<at::Tensor> live_, held_;
  std::vector<std::pair<at::Tensor, int64_t>> packed_;
  std::vector<Place> places_;
  std::vector<py::dict> empty_;
  std::vector<std::pair<py::dict, py::object>> absent_;
};

// A block of the runtime, Block or ConvBlock, with constants that were prepared once. It answers only while it knows
// that the answer is the operator's; otherwise it returns None.
template <class Kind>
class Prepared {
 public:
  Prepared(py::object watch, const py::tuple& arguments, Kind block)
      : object_(std::move(watch)), watch_(&object_.cast<Watch&>()), block_(std::move(block)) {
    for (const py::handle argument : arguments) {
      if (py::isinstance<py::list>(argument)) {
        for (const py::handle each : argument.cast<py::list>()) hold(each);
      } else {
        hold(argument);
      }
    }
  }

  bool current() const { return object_ && watch_->current() && in_place(); }

  int visit(visitproc visit, void* arg) const {
    Py_VISIT(object_.ptr());
    return 0;
  }
  void clear() { const py::object watch = std::move(object_); }

  // `rope`: of a Block that calls come with one to, else nothing.
  py::object call(const py::handle& x, const py::args& rope) const {
    if (!object_ || !watch_->holds(x, rope) || !in_place()) return py::none();
    const at::Tensor& input = THPVariable_Unpack(x.ptr());
    at::Tensor result;
    if constexpr (std::is_same_v<Kind, Block>) {
      const auto turns = rope.empty() ? OptionalTensor() : rope[0].cast<OptionalTensor>();
      if (turns.has_value() != block_.rotated()) return py::none();
      const py::gil_scoped_release release;
      result = block_.run(input, turns);
    } else {
      const py::gil_scoped_release release;
      result = block_.run(input);
    }
    return py::cast(result);
  }

 private:
  // The block may read this tensor's memory, which torch may move: to share it with a process, for one.
  void hold(const py::handle& argument) {
    if (!THPVariable_Check(argument.ptr())) return;
    const at::Tensor& tensor = THPVariable_Unpack(argument.ptr());
    memory_.emplace_back(tensor, tensor.const_data_ptr());
  }

  bool in_place() const {
    for (const auto& [tensor, address] : memory_) {
      if (tensor.const_data_ptr() != address) return false;
    }
    return true;
  }

  py::object object_;
  const Watch* watch_;  // in `object_`
  Kind block_;
  std::vector<std::pair<at::Tensor, const void*>> memory_;
};

// Lets Python's collector see what an object of class T holds.
template <class T>
py::custom_type_setup collected() {
  return py::custom_type_setup([](PyHeapTypeObject* heap_type) {
    PyTypeObject& type = heap_type->ht_type;
    type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      const auto held = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
      return held.holder_constructed() ? py::handle(self).cast<T&>().visit(visit, arg) : 0;
    };
    type.tp_clear = [](PyObject* self) {
      py::handle(self).cast<T&>().clear();
      return 0;
    };
  });
}

template <class Kind>
void define(const py::module& m, const char* name, const char* doc, Kind (*block_of)(const py::tuple&)) {
  py::class_<Prepared<Kind>>(m, name, doc, collected<Prepared<Kind>>())
      .def(py::init([block_of](py::object watch, const py::tuple& arguments) {
             return std::make_unique<Prepared<Kind>>(std::move(watch), arguments, block_of(arguments));
           }),
           py::arg("watch"), py::arg("arguments"))
      .def("current", &Prepared<Kind>::current, "Whether all that it was made from is still there and as it was.")
      .def("__call__", &Prepared<Kind>::call, py::arg("x"), "The operator's result for x, or None: see the class.");
}

// An operator with most of its arguments given beforehand, called without Python's choice of a backend.
class PreparedCall {
 public:
  PreparedCall(const std::string& name, const py::tuple& arguments, std::vector<size_t> places)
      : operator_(c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "")), places_(std::move(places)) {
    const auto& schema = operator_.schema().arguments();
    if (arguments.size() > schema.size()) throw py::value_error("arguments were more than " + name + " has");
    for (size_t i = 0; i < schema.size(); ++i) {
      const bool open = std::find(places_.begin(), places_.end(), i) != places_.end();
      if (open) {
        constants_.emplace_back();
      } else if (i < arguments.size()) {
        constants_.push_back(torch::jit::toIValue(arguments[i], schema[i].type()));
      } else {
        constants_.push_back(schema[i].default_value().value());
      }
    }
  }

  py::object call(const py::args& given) const {
    const auto& schema = operator_.schema().arguments();
    if (given.size() != places_.size()) throw py::value_error("a prepared call takes one value for each open place");
    torch::jit::Stack stack = constants_;
    for (size_t i = 0; i < places_.size(); ++i) {
      stack[places_[i]] = torch::jit::toIValue(given[i], schema[places_[i]].type());
    }
    {
      py::gil_scoped_release release;
      operator_.callBoxed(&stack);
    }
    return torch::jit::toPyObject(std::move(stack.front()));
  }

 private:
  c10::OperatorHandle operator_;
  std::vector<size_t> places_;
  torch::jit::Stack constants_;
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
      "The best CPU path that this processor can run: 'portable', 'avx2', 'avx512' or 'amx'; on ARM 'portable', "
      "'neon', 'dotprod' or 'i8mm'.");
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
  m.def(
      "gathered",
      [](const at::Tensor& x) {
        const py::gil_scoped_release release;
        at::Tensor result = dfqvit::empty_result(x.sizes(), x.scalar_type());
        const bool floats = x.scalar_type() == at::kFloat && x.numel() > 0 && !x.is_neg();
        if (floats && dfqvit::gather(x.const_data_ptr<float>(), x.sizes().data(), x.strides().data(), x.dim(),
                                     result.mutable_data_ptr<float>())) {
          return result;
        }
        return result.copy_(x);
      },
      py::arg("x"), "A contiguous copy in memory that the operators keep for their results.");
  m.def("watched", &watched, "Whether a trace, a mode, a transform or a profiler would see calls of operators now.");
  py::class_<Watch>(m, "Watch",
                    "Whether what was prepared from modules and tensors still holds; see "
                    "dfqvit/quantization/prepared.py.",
                    collected<Watch>())
      .def(py::init<const std::vector<at::Tensor>&, const std::vector<at::Tensor>&, const py::list&, const py::list&,
                    const py::list&, int64_t, int64_t>(),
           py::arg("values"), py::arg("packed"), py::arg("places"), py::arg("empty"), py::arg("absent"),
           py::arg("channels"), py::arg("dims"))
      .def("current", &Watch::current, "Whether all that it was made from is still there and as it was.")
      .def("__call__", &Watch::holds, py::arg("x"),
           "Whether it holds for a call with x, float32 [..., C] of `dims` dimensions, and with the other tensors.");
  define<Block>(m, "QuantBlock",
                "dfqvit::quant_block with prepared constants, for calls that nothing watches; see "
                "dfqvit/runtime/block.py.",
                block_of);
  define<ConvBlock>(m, "QuantConvBlock",
                    "dfqvit::quant_conv_block with prepared constants, for calls that nothing watches; see "
                    "dfqvit/runtime/block.py.",
                    conv_block_of);
  py::class_<PreparedCall>(m, "PreparedCall",
                           "A compiled operator with most of its arguments given beforehand, for calls that nothing "
                           "watches; see dfqvit/quantization/prepared.py.")
      .def(py::init<const std::string&, const py::tuple&, std::vector<size_t>>(), py::arg("name"), py::arg("arguments"),
           py::arg("places"))
      .def("__call__", &PreparedCall::call, "The result, for one value for each open place, in their order.");
}
