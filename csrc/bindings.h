// Between Python and the parameter structs: keyword arguments become fields by name, a Status becomes an exception.
// A pointer is a tensor (its first element), an address, or None; a list becomes an array on the host, of the addresses
// of its tensors or of its numbers.
// A device kernel (CUDA's, or the emulator's) is bound here too: bindings.cpp and simt_bindings.cpp differ in the rest.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "fastgpt.h"
#if defined(SIMT_CHECKED)
#include "simt/check.h"
#endif

namespace fastgpt {

namespace py = pybind11;

// The arrays that lists became; they live as long as the parameters that point into them.
using Arrays = std::vector<std::unique_ptr<std::byte[]>>;

inline void* address_of(py::handle value) {
  if (value.is_none()) return nullptr;
  if (PyLong_Check(value.ptr())) return reinterpret_cast<void*>(value.cast<uintptr_t>());
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  const auto address = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(value.ptr(), data_ptr));
  if (!address) throw py::error_already_set();
  return reinterpret_cast<void*>(address.cast<uintptr_t>());
}

template <class Field>
void read_field(py::handle value, Field& field, Arrays& arrays) {
  if constexpr (std::is_pointer_v<Field>) {
    if constexpr (!std::is_void_v<std::remove_pointer_t<Field>>) {
      if (PyList_Check(value.ptr())) {
        using Item = std::remove_const_t<std::remove_pointer_t<Field>>;
        const auto items = value.cast<py::list>();
        arrays.push_back(std::make_unique<std::byte[]>(items.size() * sizeof(Item)));
        auto* array = reinterpret_cast<Item*>(arrays.back().get());
        for (size_t i = 0; i < items.size(); ++i) read_field(items[i], array[i], arrays);
        field = array;
        return;
      }
    }
    field = static_cast<Field>(address_of(value));
  } else if constexpr (std::is_enum_v<Field>)
    field = static_cast<Field>(value.cast<int32_t>());
  else if constexpr (std::is_array_v<Field>) {
    const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(value.ptr(), "not a sequence"));
    if (!items) throw py::error_already_set();
    if (PySequence_Fast_GET_SIZE(items.ptr()) != std::extent_v<Field>) throw py::value_error("wrong number of items");
    for (size_t i = 0; i < std::extent_v<Field>; ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(items.ptr(), static_cast<Py_ssize_t>(i));
      if (!PyFloat_Check(item) && !PyLong_CheckExact(item)) throw py::type_error("not a number");  // nor is a bool
      read_field(item, field[i], arrays);
    }
  } else if constexpr (std::is_same_v<Field, int64_t> || std::is_same_v<Field, double>) {
    if constexpr (std::is_same_v<Field, double>)
      field = PyFloat_AsDouble(value.ptr());
    else
      field = PyLong_AsLongLong(value.ptr());
    if (field == Field{-1} && PyErr_Occurred()) throw py::error_already_set();
  } else
    field = value.cast<Field>();
}

// The keyword arguments of a call as CPython passes them: no dict is made.
struct Keywords {
  PyObject* const* values;
  PyObject* names;  // a tuple, or null

  Py_ssize_t size() const { return names ? PyTuple_GET_SIZE(names) : 0; }
  // `guess` is where the name may well be. Names in source code are interned, so they are one object.
  PyObject* find(PyObject* name, Py_ssize_t guess) const {
    if (guess < size() && PyTuple_GET_ITEM(names, guess) == name) return values[guess];
    for (Py_ssize_t i = 0; i < size(); ++i)
      if (PyTuple_GET_ITEM(names, i) == name || PyUnicode_Compare(PyTuple_GET_ITEM(names, i), name) == 0)
        return values[i];
    return nullptr;
  }
  py::dict dict() const {
    py::dict result;
    for (Py_ssize_t i = 0; i < size(); ++i) result[PyTuple_GET_ITEM(names, i)] = py::handle(values[i]);
    return result;
  }
};

// One function for all fields of a type, not inlined: what a small kernel's call costs is the code that must come into
// the cache for it.
template <class Params>
Params read_params(const char* entry, const Keywords& arguments, Arrays& arrays) {
  Params params{};
  Py_ssize_t count = 0;
  static std::vector<PyObject*> names;  // of the fields, made at the first call
  params.visit([&](const char* name, auto& field) __attribute__((noinline)) {
    if (count == static_cast<Py_ssize_t>(names.size())) names.push_back(PyUnicode_InternFromString(name));
    PyObject* value = arguments.find(names[count], count);
    if (!value) throw py::type_error(std::string(entry) + ": missing field '" + name + "'");
    try {
      read_field(value, field, arrays);
    } catch (const std::exception& error) {
      throw py::type_error(std::string(entry) + ": field '" + name + "': " + error.what());
    }
    ++count;
  });
  if (count != arguments.size()) {
    const py::dict unknown = arguments.dict();
    params.visit([&](const char* name, auto&) { PyDict_DelItemString(unknown.ptr(), name); });
    throw py::type_error(std::string(entry) + ": unknown field " + std::string(py::repr(unknown)));
  }
  return params;
}

// The values of a dict in an order of their own, as Keywords.
struct DictKeywords {
  explicit DictKeywords(const py::dict& dict) : names(dict.size()) {
    for (const auto& [name, value] : dict) {
      PyTuple_SET_ITEM(names.ptr(), static_cast<Py_ssize_t>(values.size()), py::handle(name).inc_ref().ptr());
      values.push_back(py::handle(value).ptr());
    }
  }
  operator Keywords() const { return {values.data(), names.ptr()}; }

  py::tuple names;
  std::vector<PyObject*> values;
};

// Unusual outcomes become sentences here; the ops name the argument, since only they know what it was called.
inline void raise_status(const char* entry, const Status& status) {
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
    case Status::launch_failed:
      throw std::runtime_error(
          name + ": the kernel could not be launched: " + cuda::error_text(static_cast<int>(status.value)));
    case Status::empty_support: throw py::value_error(name + ": row " + at + " leaves no token to choose from");
  }
  throw std::runtime_error(name + ": unknown status");
}

// What the checked emulator is told about a call: a kernel reads what its const pointers lead to, and only writes to
// the rest, so reading there first is an error.
#if defined(SIMT_CHECKED)
template <class Params>
void tell_checker(Params& params, const void* workspace) {
  for (const bool inputs : {false, true})
    params.visit([&](const char* name, auto& field) {
      using Field = std::remove_reference_t<decltype(field)>;
      if constexpr (std::is_pointer_v<Field>) {
        const bool input = std::is_const_v<std::remove_pointer_t<Field>> || !std::strcmp(name, "totals");  // added to
        if (field && input == inputs) simt::check::set_written(field, input);
      }
    });
  if (workspace) simt::check::set_written(workspace, false);
}
#else
template <class Params>
void tell_checker(Params&, const void*) {}
#endif

// m.entry(stream=, allocate=, field=...): asks the kernel how much workspace it wants, has Python's `allocate(bytes)`
// give the address of that much device memory, and launches on the stream (0: the default one). `check` raises where
// no kernel could run.
template <class Params>
void bind_device_kernel(py::module_& m, const char* entry, const DeviceKernel<Params>& kernel, void (*check)()) {
  if (!kernel.run) return;
  m.def(
      entry,
      [entry, kernel, check](uintptr_t stream, const py::function& allocate, const py::kwargs& arguments) {
        if (check) check();
        Arrays arrays;
        Params params = read_params<Params>(entry, DictKeywords(arguments), arrays);
        int64_t bytes = 0;
        raise_status(entry, kernel.workspace_bytes(params, &bytes));
        void* workspace = nullptr;
        if (bytes > 0) workspace = reinterpret_cast<void*>(allocate(bytes).template cast<uintptr_t>());
        tell_checker(params, workspace);
        Status status;
        {
          py::gil_scoped_release release;
          status = kernel.run(params, stream, workspace);
        }
        raise_status(entry, status);
      },
      py::kw_only(), py::arg("stream"), py::arg("allocate"));
}

inline void bind_device_kernels(py::module_& m, const DeviceKernels& kernels, void (*check)() = nullptr) {
#define FASTGPT_KERNEL(entry, Params) bind_device_kernel<Params>(m, #entry, kernels.entry, check);
  FASTGPT_FOR_EACH_KERNEL(FASTGPT_KERNEL)
#undef FASTGPT_KERNEL
}

}  // namespace fastgpt
