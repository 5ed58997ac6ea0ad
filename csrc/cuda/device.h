// What this build and this machine have of CUDA. Without nvcc, device_none.cpp answers in place of device.cu.
#pragma once

#include <string>

namespace fastgpt::cuda {

bool compiled();
// The architectures that the build holds code for, as CMake was told; empty without CUDA.
const char* architectures();
// One line: the device and driver in use, or why there is none.
std::string describe();
// Why the current device cannot run the kernels (no driver, an old one, an old GPU), as a sentence; empty if it can.
std::string problem();
// What a cudaError_t means.
std::string error_text(int error);

}  // namespace fastgpt::cuda
