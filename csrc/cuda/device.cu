#include <cuda_runtime.h>

#include "cuda/device.h"

namespace fastgpt::cuda {

bool compiled() { return true; }
const char* architectures() { return FASTGPT_CUDA_ARCHITECTURES; }

std::string describe() {
  int driver = 0, count = 0;
  cudaDriverGetVersion(&driver);
  if (driver == 0) return "no NVIDIA driver on this machine";
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess)
    return "driver for CUDA " + version(driver) + ", but no usable GPU: " + cudaGetErrorString(error);
  if (count == 0) return "driver for CUDA " + version(driver) + ", but no GPU";
  cudaDeviceProp properties{};
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, 0); error != cudaSuccess)
    return std::string("GPU 0 cannot be read: ") + cudaGetErrorString(error);
  return std::string(properties.name) + ", compute capability " + std::to_string(properties.major) + "." +
         std::to_string(properties.minor) + ", " + std::to_string(properties.totalGlobalMem >> 20) +
         " MiB, driver for CUDA " + version(driver);
}

}  // namespace fastgpt::cuda
