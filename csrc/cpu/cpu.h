// The CPU backend: one table of kernels per instruction-set level, one of them active.
#pragma once

#include "fastgpt.h"

namespace fastgpt::cpu {

struct Kernels {
#define FASTGPT_KERNEL(entry, Params) Status (*entry)(const Params&);
  FASTGPT_FOR_EACH_KERNEL(FASTGPT_KERNEL)
#undef FASTGPT_KERNEL
};

struct Level {
  const char* name;
  const char* needs;         // the processor features, as a person would look them up
  bool (*supported)();       // by this processor and operating system
  const Kernels& (*kernels)();
};

// Levels in this build, slowest first.
const Level* levels(int* count);
const Level& active_level();
// False when the name is unknown or the machine lacks what the level needs.
bool set_active_level(const char* name);

}  // namespace fastgpt::cpu
