// Where the emulator tells a checker what a kernel does. In the plain build these are nothing; in the checked build
// (SIMT_CHECKED) check.cpp keeps a shadow of every byte, and also receives each plain load and store of the kernels,
// which the compiler reports to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "simt/runtime.h"

namespace simt::check {

enum class Access : uint8_t { read, write, atomic };

#if defined(SIMT_CHECKED)

// --- what the runtime reports ---

void launch_begin(const char* kernel, const void* arguments, size_t bytes);
void launch_end();
void block_begin(const void* shared, size_t bytes);
void shared_added(const void* shared, size_t bytes);  // a static variable that this launch had not met before
void block_end();
void lane_end();
void barrier();                 // every lane of the block has arrived
void warp_sync(uint32_t mask);  // of the current lane's warp
void fence();                   // __threadfence
void access(const void* address, size_t bytes, Access kind, Site site);
void copy_issued(void* shared, const void* global, int bytes, bool valid, Site site);
void copy_waited(void* shared, int bytes);  // by the lane that issued it

// --- what the host says and asks ---

// Memory of the emulator itself, which kernels read behind the scenes (threadIdx) and their locals live in.
void ignore(const void* address, size_t bytes);

// Global memory that kernels may touch from now on. `written` says whether it holds something already: reading a byte
// that nothing was written to is an error.
void add_region(const void* address, size_t bytes, bool written);
void set_written(const void* address, bool written);  // of the region that holds this address
void clear_regions();

// How the warps' accesses fell, since the last clear_requests(), by kernel and place.
struct Requests {
  std::string kernel;
  Site site;        // line 0: look the program counter up
  const void* pc;
  bool shared;
  Access kind;
  int64_t requests = 0;  // of a warp
  int64_t bytes = 0;     // that the lanes asked for, each once
  // Global: sectors of 32 bytes touched, and the fewest that could hold those bytes.
  // Shared: wavefronts (passes over the 32 banks), and the fewest that accesses of this size need.
  int64_t moved = 0, ideal = 0;
};
// "file:line" of program counters.
std::vector<std::string> look_up(const std::vector<const void*>& counters);
std::vector<Requests> requests();
void clear_requests();
void count_requests(bool enabled);

#else
inline void launch_begin(const char*, const void*, size_t) {}
inline void launch_end() {}
inline void block_begin(const void*, size_t) {}
inline void shared_added(const void*, size_t) {}
inline void block_end() {}
inline void lane_end() {}
inline void barrier() {}
inline void warp_sync(uint32_t) {}
inline void fence() {}
inline void access(const void*, size_t, Access, Site) {}
inline void copy_issued(void*, const void*, int, bool, Site) {}
inline void copy_waited(void*, int) {}
inline void ignore(const void*, size_t) {}
#endif

}  // namespace simt::check
