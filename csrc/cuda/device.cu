#include <cuda_runtime.h>

#include <mutex>

#include "cuda/device.h"

namespace fastgpt::cuda {

bool compiled() { return true; }
const char* architectures() { return FASTGPT_CUDA_ARCHITECTURES; }

namespace {

std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

constexpr int kOldestCapability = 80;
constexpr int kMostDevices = 64;

std::string problem_of(int device) {
  int driver = 0, runtime = 0, major = 0, minor = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return "no NVIDIA driver on this machine";
  if (driver / 1000 < runtime / 1000)  // within a major version, an older driver still serves
    return "the driver supports CUDA " + version(driver) + ", but fastgpt was built with CUDA " + version(runtime) +
           ": update the driver, or build fastgpt with an older CUDA toolkit";
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (10 * major + minor < kOldestCapability)
    return "GPU " + std::to_string(device) + " has compute capability " + std::to_string(major) + "." +
           std::to_string(minor) + "; the kernels need 8.0 or newer (backend='reference' runs on any GPU)";
  return "";
}

}  // namespace

std::string problem() {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return describe();
  static std::once_flag asked[kMostDevices];
  static std::string answers[kMostDevices];
  if (device >= kMostDevices) return problem_of(device);
  std::call_once(asked[device], [device] { answers[device] = problem_of(device); });
  return answers[device];
}

std::string error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

std::string describe() {
  int driver = 0, count = 0;
  cudaDriverGetVersion(&driver);
  if (driver == 0) return "no NVIDIA driver on this machine";
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
