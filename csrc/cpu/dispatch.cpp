// Chooses the instruction-set level at run time: the fastest one that this machine has, unless told otherwise.
#include <cstring>

#include "cpu/cpu.h"

namespace fastgpt {

#define FASTGPT_LEVEL(isa)       \
  namespace isa {                \
  const cpu::Kernels& kernels(); \
  }
#ifdef FASTGPT_X86
FASTGPT_LEVEL(baseline)
FASTGPT_LEVEL(avx2)
FASTGPT_LEVEL(avx512)
FASTGPT_LEVEL(avx512_bf16)
#else
FASTGPT_LEVEL(portable)
#endif
#undef FASTGPT_LEVEL

namespace cpu {
namespace {

#ifdef FASTGPT_X86
[[maybe_unused]] bool has_v2() { return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt"); }
bool has_v3() {
  return has_v2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool has_v4_bf16() {
  return has_v4() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}

const Level all_levels[] = {
#ifdef FASTGPT_HAS_BASELINE  // by FASTGPT_LEVELS of CMakeLists.txt: all, unless told otherwise
    {"baseline", "x86-64-v2 (SSE4.2)", has_v2, &fastgpt::baseline::kernels},
#endif
#ifdef FASTGPT_HAS_AVX2
    {"avx2", "x86-64-v3 (AVX2, FMA)", has_v3, &fastgpt::avx2::kernels},
#endif
#ifdef FASTGPT_HAS_AVX512
    {"avx512", "x86-64-v4 (AVX-512 F, BW, CD, DQ, VL)", has_v4, &fastgpt::avx512::kernels},
#endif
#ifdef FASTGPT_HAS_AVX512_BF16
    {"avx512_bf16", "x86-64-v4 with AVX-512 BF16 and VNNI", has_v4_bf16, &fastgpt::avx512_bf16::kernels},
#endif
};
#else
const Level all_levels[] = {{"portable", "nothing special", [] { return true; }, &fastgpt::portable::kernels}};
#endif

constexpr int level_count = sizeof(all_levels) / sizeof(all_levels[0]);

const Level* fastest() {
  const Level* best = &all_levels[0];
  for (const Level& level : all_levels)
    if (level.supported()) best = &level;
  return best;
}

const Level*& active() {
  static const Level* level = fastest();
  return level;
}

}  // namespace

const Level* levels(int* count) {
  *count = level_count;
  return all_levels;
}

const Level& active_level() { return *active(); }

bool set_active_level(const char* name) {
  for (const Level& level : all_levels)
    if (std::strcmp(level.name, name) == 0 && level.supported()) {
      active() = &level;
      return true;
    }
  return false;
}

}  // namespace cpu
}  // namespace fastgpt
