// The table of kernels of one instruction-set level; compiled once per level, like the kernels themselves.
#include "core/isa.h"
#include "cpu/cpu.h"

namespace fastgpt::FASTGPT_ISA {

#define FASTGPT_KERNEL(entry, Params) Status entry(const Params&);
FASTGPT_FOR_EACH_KERNEL(FASTGPT_KERNEL)
#undef FASTGPT_KERNEL

const cpu::Kernels& kernels() {
  static const cpu::Kernels table = {
#define FASTGPT_KERNEL(entry, Params) &entry,
      FASTGPT_FOR_EACH_KERNEL(FASTGPT_KERNEL)
#undef FASTGPT_KERNEL
  };
  return table;
}

}  // namespace fastgpt::FASTGPT_ISA
