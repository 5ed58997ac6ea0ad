#include "cuda/device.h"

namespace fastgpt::cuda {

bool compiled() { return false; }
const char* architectures() { return ""; }
std::string describe() { return "not compiled in (nvcc was not found, or FASTGPT_CUDA=off, when fastgpt was built)"; }

}  // namespace fastgpt::cuda
