// For a build of the Hugging Face Hub only (scripts/hub_kernels.py): lets Python import the library of operators. They
// are registered where they are defined, and by library.cpp.
#include <Python.h>
#include <c10/macros/Macros.h>

PyMODINIT_FUNC C10_CONCATENATE(PyInit_, TORCH_EXTENSION_NAME)() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, C10_STRINGIZE(TORCH_EXTENSION_NAME), nullptr, 0, nullptr};
  return PyModule_Create(&module);
}
