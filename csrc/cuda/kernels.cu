// Fills the table of device kernels; compiled by nvcc and, for the emulator, by g++, like the kernels themselves.
#include "cuda/core/launch.h"
#include "cuda/kernels.h"

namespace fastgpt::FASTGPT_ISA {

#define FASTGPT_KERNEL(entry, Params) Status entry(const Params&, Launch&);
FASTGPT_FOR_EACH_KERNEL(FASTGPT_KERNEL)
#undef FASTGPT_KERNEL

namespace {

template <class Params, Status (*entry)(const Params&, Launch&)>
DeviceKernel<Params> device_kernel() {
  return {[](const Params& p, int64_t* bytes) -> Status {
            Launch dry(nullptr);
            const Status status = entry(p, dry);
            *bytes = dry.scratch_bytes();
            return status;
          },
          [](const Params& p, uintptr_t stream, void* workspace) -> Status {
            Launch launch(reinterpret_cast<cudaStream_t>(stream), workspace);
            return entry(p, launch);
          }};
}

}  // namespace

const DeviceKernels& kernels() {
  static const DeviceKernels table = {
#define FASTGPT_KERNEL(entry, Params) device_kernel<Params, &entry>(),
      FASTGPT_FOR_EACH_KERNEL(FASTGPT_KERNEL)
#undef FASTGPT_KERNEL
  };
  return table;
}

}  // namespace fastgpt::FASTGPT_ISA
