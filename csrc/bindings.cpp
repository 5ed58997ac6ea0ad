// fastgpt._C: pointers in, status out. Knows the kernels only through FASTGPT_FOR_EACH_KERNEL.
//
//   _C.cpu.<kernel>(field=value, ...)   every field of the kernel's parameter struct, by name
//   _C.cpu.isa(), set_isa(name), isas()  the instruction-set level in use, and what there is
//   _C.set_parallel_functions(loop, count), thread_count(), set_own_threads(n)
//   _C.advise_huge_pages(address, bytes)
//   _C.cuda.<kernel>(stream=, allocate=, field=value, ...), where CUDA was compiled in
#include "bindings.h"

#include "core/memory.h"
#include "core/parallel.h"
#include "cpu/cpu.h"

using namespace fastgpt;

namespace {

// A kernel as a plain function of CPython's: pybind11's own way of calling costs small operators as much as the work.
template <class Params>
struct CpuKernel {
  const char* entry;
  Status (*cpu::Kernels::*kernel)(const Params&);
  PyMethodDef method;

  static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t positional, PyObject* names) {
    const auto& kernel = *static_cast<const CpuKernel*>(PyCapsule_GetPointer(self, nullptr));
    try {
      if (positional) throw py::type_error(std::string(kernel.entry) + ": every field is given by name");
      Arrays arrays;
      const Params params = read_params<Params>(kernel.entry, Keywords{args, names}, arrays);
      Status status;
      Py_BEGIN_ALLOW_THREADS;
      status = (cpu::active_level().kernels().*kernel.kernel)(params);
      Py_END_ALLOW_THREADS;
      raise_status(kernel.entry, status);
      Py_RETURN_NONE;
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const py::builtin_exception& error) {
      error.set_error();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }
};

template <class Params>
void bind_cpu(py::module_& m, const char* entry, Status (*cpu::Kernels::*kernel)(const Params&)) {
  auto* bound = new CpuKernel<Params>{entry, kernel, {}};  // lives as long as the module
  bound->method = {entry, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&CpuKernel<Params>::call)),
                   METH_FASTCALL | METH_KEYWORDS, nullptr};
  m.attr(entry) = py::reinterpret_steal<py::object>(PyCFunction_New(&bound->method, py::capsule(bound).ptr()));
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
  bind_device_kernels(cuda_module, cuda::kernels(), [] {
    if (const std::string problem = cuda::problem(); !problem.empty())
      throw std::runtime_error("CUDA kernels: " + problem);
  });
}
