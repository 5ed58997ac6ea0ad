// Where the emulator tells a checker what a kernel does. In the plain build these are nothing; in the checked build
// (SIMT_CHECKED) check.cpp keeps a shadow of every byte, and also receives each plain load and store of the kernels,
// which the compiler reports to it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simt/runtime.h"

namespace simt::check {

enum class Access { read, write, atomic };

#if defined(SIMT_CHECKED)
void launch_begin(const char* kernel, const void* arguments, size_t bytes);
void launch_end();
void block_begin(const void* shared, size_t bytes);
void shared_added(const void* shared, size_t bytes);  // a static variable that this launch had not met before
void lane_end();
void barrier();                // every lane of the block has arrived
void warp_sync(uint32_t mask);  // of the current lane's warp
void access(const void* address, size_t bytes, Access kind, Site site);
void copy_issued(void* shared, const void* global, int bytes, bool valid, Site site);
void copy_waited(void* shared, int bytes);  // by the lane that issued it
#else
inline void launch_begin(const char*, const void*, size_t) {}
inline void launch_end() {}
inline void block_begin(const void*, size_t) {}
inline void shared_added(const void*, size_t) {}
inline void lane_end() {}
inline void barrier() {}
inline void warp_sync(uint32_t) {}
inline void access(const void*, size_t, Access, Site) {}
inline void copy_issued(void*, const void*, int, bool, Site) {}
inline void copy_waited(void*, int) {}
#endif

}  // namespace simt::check
