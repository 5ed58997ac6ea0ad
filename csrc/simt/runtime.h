// Runs CUDA kernels on a CPU: one fiber a thread, one block after another, warp collectives and barriers in between.
//
// Everything a kernel can notice of a GPU's order of execution is a choice of the schedule here: in which order lanes
// run between two points where they must meet, in which order blocks run, and whether a cp.async copies when it is
// issued or as late as the hardware may. docs/simt.md says what this can see and what it cannot.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace simt {

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr size_t count() const { return size_t{x} * y * z; }
};

// A place in a kernel's source. Lanes that meet in a collective must come from the same one.
struct Site {
  const char* file;
  int line;
};
#define SIMT_SITE (::simt::Site{__FILE__, __LINE__})
// As the last parameter of a function that wraps an intrinsic: the place is then the caller's.
#define SIMT_ONLY_CALLER ::simt::Site site = {__builtin_FILE(), __builtin_LINE()}
#define SIMT_CALLER , SIMT_ONLY_CALLER

// What a kernel did wrong, as a sentence with file and line. The launch is abandoned where it happens.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { forward, reverse, random };
struct Schedule {
  Order order = Order::forward;  // of lanes that may run, and of blocks
  uint64_t seed = 0;
  bool lazy_copies = false;  // cp.async: the destination is poisoned when issued and copied when waited for
};
struct Device {
  size_t shared_limit = 99 * 1024;  // bytes a block may have: the least of the architectures from sm_80 on (sm_86)
  int sms = 108;
};
Schedule& schedule();
Device& device();

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xffffffffu;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kSharedArena = 228 << 10;  // more than any device gives a block

struct Lane {
  void* stack_pointer = nullptr;
  Dim3 thread{0, 0, 0};
  uint32_t index = 0;  // in its block
  uint32_t warp() const { return index / kWarpSize; }
  uint32_t lane() const { return index % kWarpSize; }
  enum State : uint8_t { ready, waiting, finished } state = ready;
  const char* waits_for = "";
  Site waits_at{"", 0};
  int committed = 0;  // groups of cp.async
};

// The thread, block and grid that run now. Plain globals: one launch at a time (launch() holds a lock).
extern Lane* current;
extern Dim3 block_index, block_size, grid_size;

[[noreturn]] void fail(const std::string& what);
std::string describe(const Site& site);
std::string describe_current();  // "thread (1, 0, 0) of block (2, 0, 0)"

// --- launching ---

void launch(const char* kernel, Dim3 grid, Dim3 block, size_t dynamic_shared, void (*body)(void*), void* closure,
            size_t closure_bytes);

// Every shape that a kernel was launched with in this process, apart from its grid.
struct Launched {
  std::string kernel;
  unsigned threads;  // of a block
  size_t dynamic_shared;
  uint64_t times;
};
std::vector<Launched> launches();

// "kernel_name<float, 4>" of a __PRETTY_FUNCTION__, without namespaces.
std::string short_name(std::string_view pretty);

template <auto kernel>
const char* kernel_name() {
  static const std::string name = short_name(__PRETTY_FUNCTION__);
  return name.c_str();
}

// Runs kernel(arguments...) as cudaLaunchKernel would: arguments are copied, then converted to the parameters' types.
template <auto kernel, class... Params, class... Arguments>
void launch_as(void (*)(Params...), Dim3 grid, Dim3 block, size_t dynamic_shared, const Arguments&... arguments) {
  static_assert(sizeof...(Params) == sizeof...(Arguments), "the kernel takes another number of arguments");
  std::tuple<Params...> copies(static_cast<Params>(arguments)...);
  launch(
      kernel_name<kernel>(), grid, block, dynamic_shared,
      [](void* closure) { std::apply(kernel, *static_cast<std::tuple<Params...>*>(closure)); }, &copies,
      sizeof(copies));
}

// --- shared memory ---

// The block's static variable that `key` stands for (the address of a static object: one per place and instantiation).
void* shared_static(const void* key, size_t bytes, size_t alignment);
void* shared_dynamic();
bool is_shared(const void* address, size_t bytes);

// --- meeting points ---

// What a warp-wide operation computes once all its lanes are there: arguments[i] is lane i's, for lanes in `mask`.
using Complete = void (*)(void* const* arguments, uint32_t mask);
void collective(const char* kind, Site site, uint32_t mask, void* arguments, Complete complete);
// All threads of the block; returns the sum, the or and the and of their predicates through `votes`.
struct Votes {
  int count = 0;
  bool any = false, all = true;
};
Votes barrier(Site site, bool predicate = false);
void sync_warp(Site site, uint32_t mask = kFullMask);

// --- memory ---

void check_aligned(const void* address, size_t bytes, const char* what, Site site);
void copy_async(void* shared, const void* global, int bytes, bool valid, Site site);
void copy_async_commit();
void copy_async_wait(int groups_left, Site site);

}  // namespace simt
