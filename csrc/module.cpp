// The Python module seqops._C. Importing it registers torch.ops.seqops.*; rooms add their operators in <room>/<room>.cpp.
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include <string>

#include "common/isa.h"

namespace {

std::string cpu_isa() { return seqops::isa_name(seqops::isa()); }

}  // namespace

STABLE_TORCH_LIBRARY(seqops, m) { m.def("cpu_isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(seqops, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

// Reads SEQOPS_CPU_ISA now, so that a wrong value is an ImportError and not an abort inside a kernel.
PyMODINIT_FUNC PyInit__C(void) {
  try {
    seqops::isa();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
