// CUDA as a kernel file sees it: NVIDIA's headers under nvcc, the emulator's (csrc/simt) under g++.
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define SIMT_CALLER
#define SIMT_ONLY_CALLER
#define FASTGPT_SITE
#else
#include "simt/cuda.h"
#define FASTGPT_SITE , site  // hands a function's SIMT_CALLER on
#endif

#include <type_traits>

#include "core/dtype.h"
#include "core/isa.h"
#include "fastgpt.h"

// Shared memory, static and dynamic: `type name[count]`, and `type* name` for the launch's dynamic bytes.
#if defined(__CUDACC__)
#define FASTGPT_SHARED(type, name, count) __shared__ alignas(16) type name[count]
#define FASTGPT_SHARED_DYNAMIC(type, name)                                 \
  extern __shared__ __align__(128) unsigned char fastgpt_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(fastgpt_dynamic_shared)
#else
#define FASTGPT_SHARED(type, name, count) \
  static char name##_key;                 \
  type(&name)[count] = *static_cast<type(*)[count]>(::simt::shared_static(&name##_key, sizeof(type) * (count), 16))
#define FASTGPT_SHARED_DYNAMIC(type, name) type* const name = static_cast<type*>(::simt::shared_dynamic())
#endif

namespace fastgpt::FASTGPT_ISA {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

FASTGPT_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTGPT_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace fastgpt::FASTGPT_ISA
