// fastgpt._simt and fastgpt._simt_checked: the CUDA kernels on the emulator (csrc/simt), for tests.
//
//   <kernel>(stream=0, allocate=, field=value, ...)   as fastgpt._C.cuda has them
//   configure(order=, seed=, lazy_copies=, shared_limit=)   the schedule of all launches from now on
//   launches()   [(kernel, threads of a block, bytes of dynamic shared memory, times)] of this process
//   checked   whether this is the build that checks every access
#include "bindings.h"
#include "simt/check.h"
#include "simt/runtime.h"

using namespace fastgpt;
using namespace pybind11::literals;

#if defined(SIMT_CHECKED)
#define FASTGPT_SIMT_MODULE _simt_checked
#else
#define FASTGPT_SIMT_MODULE _simt
#endif

PYBIND11_MODULE(FASTGPT_SIMT_MODULE, m) {
  m.doc() = "fastgpt's CUDA kernels, run by an emulator on the CPU. Not a public interface: use backend='simt'.";
#if defined(SIMT_CHECKED)
  m.attr("checked") = true;
#else
  m.attr("checked") = false;
#endif
  py::register_exception<simt::Error>(m, "KernelError", PyExc_RuntimeError);
  m.def(
      "configure",
      [](const std::string& order, uint64_t seed, bool lazy_copies, size_t shared_limit) {
        simt::Schedule& schedule = simt::schedule();
        if (order == "forward")
          schedule.order = simt::Order::forward;
        else if (order == "reverse")
          schedule.order = simt::Order::reverse;
        else if (order == "random")
          schedule.order = simt::Order::random;
        else
          throw py::value_error("order='" + order + "'; allowed are 'forward', 'reverse', 'random'");
        schedule.seed = seed;
        schedule.lazy_copies = lazy_copies;
        simt::device().shared_limit = shared_limit;
      },
      py::kw_only(), py::arg("order") = "forward", py::arg("seed") = 0, py::arg("lazy_copies") = false,
      py::arg("shared_limit") = 99 * 1024);
  m.def("launches", [] {
    py::list out;
    for (const simt::Launched& l : simt::launches())
      out.append(py::make_tuple(l.kernel, l.threads, l.dynamic_shared, l.times));
    return out;
  });
#if defined(SIMT_CHECKED)
  m.def("register_region", [](uintptr_t address, size_t bytes) {
    simt::check::add_region(reinterpret_cast<void*>(address), bytes, true);
  });
  m.def("clear_regions", &simt::check::clear_regions);
  m.def("count_requests", [](bool enabled) {
    simt::check::clear_requests();
    simt::check::count_requests(enabled);
  });
  m.def("requests", [] {
    const auto all = simt::check::requests();
    std::vector<const void*> counters;
    for (const auto& r : all)
      if (!r.site.line) counters.push_back(r.pc);
    const auto places = simt::check::look_up(counters);
    size_t next = 0;
    py::list out;
    for (const auto& r : all) {
      const char* kinds[] = {"read", "write", "atomic"};
      out.append(py::dict("kernel"_a = r.kernel, "place"_a = r.site.line ? simt::describe(r.site) : places[next++],
                          "space"_a = r.shared ? "shared" : "global", "kind"_a = kinds[static_cast<int>(r.kind)],
                          "requests"_a = r.requests, "bytes"_a = r.bytes, "moved"_a = r.moved, "ideal"_a = r.ideal));
    }
    return out;
  });
#endif
  bind_device_kernels(m, emulated::kernels());
}
