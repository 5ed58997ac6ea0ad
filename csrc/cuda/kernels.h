// The table of device kernels: CUDA's, compiled by nvcc, and the same sources compiled for the emulator.
#pragma once

#include <cstdint>

#include "fastgpt.h"

namespace fastgpt {

template <class Params>
struct DeviceKernel {
  // Bytes of workspace that the call wants; launches nothing.
  Status (*workspace_bytes)(const Params&, int64_t* bytes) = nullptr;
  // Launches on a stream (a cudaStream_t as an integer), with that workspace. Null in a build without CUDA.
  Status (*run)(const Params&, uintptr_t stream, void* workspace) = nullptr;
};

struct DeviceKernels {
#define FASTGPT_KERNEL(entry, Params) DeviceKernel<Params> entry;
  FASTGPT_FOR_EACH_KERNEL(FASTGPT_KERNEL)
#undef FASTGPT_KERNEL
};

namespace cuda {
const DeviceKernels& kernels();  // empty in a build without CUDA
}
namespace emulated {
const DeviceKernels& kernels();
}

}  // namespace fastgpt
