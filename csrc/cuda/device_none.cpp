#include "cuda/device.h"
#include "cuda/kernels.h"

namespace fastgpt::cuda {

bool compiled() { return false; }
const char* architectures() { return ""; }
std::string describe() { return "not compiled in (nvcc was not found, or FASTGPT_CUDA=off, when fastgpt was built)"; }
std::string problem() { return describe(); }
std::string error_text(int error) { return "CUDA error " + std::to_string(error); }

const DeviceKernels& kernels() {
  static const DeviceKernels none;
  return none;
}

}  // namespace fastgpt::cuda
