// What the files of test kernels share: kernels by name, all of one shape, run from Python under any schedule.
#pragma once

#include <cstdio>
#include <map>
#include <string>

#include "simt/cuda.h"

using Kernel = void (*)(const uint32_t* in, uint32_t* out);
struct Entry {
  void (*launch)(simt::Dim3 grid, simt::Dim3 block, size_t shared, const uint32_t* in, uint32_t* out);
};
template <Kernel kernel>
constexpr Entry entry() {
  return {[](simt::Dim3 grid, simt::Dim3 block, size_t shared, const uint32_t* in, uint32_t* out) {
    simt::launch_as<kernel>(kernel, grid, block, shared, in, out);
  }};
}
extern const std::map<std::string, Entry> kernels;

struct Run {
  const char* kernel;
  int order;  // of simt::Order
  uint64_t seed;
  int lazy;
  unsigned grid[3], block[3];
  uint64_t shared, shared_limit;
  const uint32_t* in;
  uint32_t* out;
};

// `message` is what the emulator said, or empty.
extern "C" inline __attribute__((used)) void run(const Run* r, char* message, int size) {
  message[0] = 0;
  simt::schedule() = {static_cast<simt::Order>(r->order), r->seed, r->lazy != 0};
  simt::device().shared_limit = r->shared_limit;
  try {
    kernels.at(r->kernel).launch({r->grid[0], r->grid[1], r->grid[2]}, {r->block[0], r->block[1], r->block[2]},
                                 r->shared, r->in, r->out);
  } catch (const simt::Error& error) {
    std::snprintf(message, static_cast<size_t>(size), "%s", error.what());
  }
}
