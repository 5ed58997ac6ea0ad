// fastgpt._C: pointers in, status out. Knows the kernels only through FASTGPT_FOR_EACH_KERNEL.
//
//   _C.cpu.<kernel>(field=value, ...)   every field of the kernel's parameter struct, by name; pointers as integers
//   _C.cpu.isa(), set_isa(name), isas()  the instruction-set level in use, and what there is
//   _C.set_parallel_functions(loop, count), thread_count(), set_own_threads(n)
//   _C.advise_huge_pages(address, bytes)
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <type_traits>

#include "core/memory.h"
#include "core/parallel.h"
#include "cpu/cpu.h"
#include "cuda/device.h"
#include "fastgpt.h"

namespace py = pybind11;
using namespace fastgpt;

namespace {

template <class Field>
void read_field(py::handle value, Field& field) {
  if constexpr (std::is_pointer_v<Field>)
    field = value.is_none() ? nullptr : reinterpret_cast<Field>(value.cast<uintptr_t>());
  else if constexpr (std::is_enum_v<Field>)
    field = static_cast<Field>(value.cast<int32_t>());
  else if constexpr (std::is_array_v<Field>) {
    const auto items = value.cast<py::sequence>();
    if (items.size() != std::extent_v<Field>) throw py::value_error("wrong number of items");
    for (size_t i = 0; i < items.size(); ++i) read_field(items[i], field[i]);
  } else
    field = value.cast<Field>();
}

template <class Params>
Params read_params(const char* entry, const py::kwargs& arguments) {
  Params params{};
  size_t count = 0;
  params.visit([&](const char* name, auto& field) {
    PyObject* value = PyDict_GetItemString(arguments.ptr(), name);
    if (!value) throw py::type_error(std::string(entry) + ": missing field '" + name + "'");
    try {
      read_field(value, field);
    } catch (const std::exception& error) {
      throw py::type_error(std::string(entry) + ": field '" + name + "': " + error.what());
    }
    ++count;
  });
  if (count != arguments.size()) {
    params.visit([&](const char* name, auto&) { PyDict_DelItemString(arguments.ptr(), name); });
    throw py::type_error(std::string(entry) + ": unknown field " + std::string(py::repr(arguments)));
  }
  return params;
}

// Unusual outcomes become sentences here; the ops name the argument, since only they know what it was called.
void raise_status(const char* entry, const Status& status) {
  const std::string at = std::to_string(status.at), value = std::to_string(status.value), name = entry;
  switch (status.code) {
    case Status::ok: return;
    case Status::unsupported_dtype: throw py::type_error(name + ": no kernel for dtype code " + value);
    case Status::unsupported_shape: throw py::value_error(name + ": no kernel for size " + value);
    case Status::out_of_memory:
      PyErr_Format(PyExc_MemoryError, "%s: could not allocate %s bytes of scratch memory", entry, value.c_str());
      throw py::error_already_set();
    case Status::bad_index:
      PyErr_Format(PyExc_IndexError, "%s: index %s at position %s is out of range", entry, value.c_str(), at.c_str());
      throw py::error_already_set();
    case Status::not_finite: throw py::value_error(name + ": row " + at + " holds NaN (or +inf) at column " + value);
    case Status::empty_support: throw py::value_error(name + ": row " + at + " leaves no token to choose from");
  }
  throw std::runtime_error(name + ": unknown status");
}

template <class Params>
void bind_cpu(py::module_& m, const char* entry, Status (*cpu::Kernels::*kernel)(const Params&)) {
  m.def(entry, [entry, kernel](const py::kwargs& arguments) {
    const Params params = read_params<Params>(entry, arguments);
    Status status;
    {
      py::gil_scoped_release release;
      status = (cpu::active_level().kernels().*kernel)(params);
    }
    raise_status(entry, status);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fastgpt. Not a public interface: use fastgpt.ops.";

  m.def("set_parallel_functions", [](uintptr_t loop, uintptr_t count) {
    set_parallel_functions(reinterpret_cast<LoopFunction>(loop), reinterpret_cast<ThreadCountFunction>(count));
  });
  m.def("thread_count", &thread_count);
  m.def("set_own_threads", &set_own_threads);
  m.def("advise_huge_pages",
        [](uintptr_t address, int64_t bytes) { advise_huge_pages(reinterpret_cast<void*>(address), bytes); });

  py::module_ cpu_module = m.def_submodule("cpu", "CPU kernels of the active instruction-set level.");
  cpu_module.def("isa", [] { return std::string(cpu::active_level().name); });
  cpu_module.def("isas", [] {
    py::list out;
    int count = 0;
    const cpu::Level* levels = cpu::levels(&count);
    for (int i = 0; i < count; ++i) out.append(py::make_tuple(levels[i].name, levels[i].needs, levels[i].supported()));
    return out;
  });
  cpu_module.def("set_isa", [](const std::string& name) { return cpu::set_active_level(name.c_str()); });
#define FASTGPT_KERNEL(entry, Params) bind_cpu<Params>(cpu_module, #entry, &cpu::Kernels::entry);
  FASTGPT_FOR_EACH_KERNEL(FASTGPT_KERNEL)
#undef FASTGPT_KERNEL

  py::module_ cuda_module = m.def_submodule("cuda", "The CUDA side of this build.");
  cuda_module.attr("compiled") = cuda::compiled();
  cuda_module.attr("architectures") = cuda::architectures();
  cuda_module.def("describe", &cuda::describe);
}
