#include "simt/runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "simt/check.h"
#include "simt/fiber.h"

namespace simt {

Lane* current = nullptr;
Dim3 block_index, block_size, grid_size;

namespace {

// Enough for a kernel's registers, spilt to the stack by a compiler that has a dozen of them. Pages that no lane
// touches cost nothing.
constexpr size_t kStackBytes = 256 << 10;
// Stack tops differ by this much, so that the lanes' hot words do not all fall into one set of the cache.
constexpr size_t kStagger = 1088;
constexpr uint64_t kStackGuard = 0x5afe57ac4f1be125u;
// Shared memory as it comes: every float, half and bfloat16 read from it is NaN.
constexpr unsigned char kPoison = 0xff;

struct Random {  // splitmix64
  uint64_t state = 0;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  size_t below(size_t n) { return next() % n; }
};

// A warp-wide operation that waits for lanes. Disjoint groups of a warp may each be in one.
struct Meeting {
  const char* kind;
  Site site;
  uint32_t mask, arrived;
  Complete complete;
  void* arguments[kWarpSize];
};

struct Warp {
  uint32_t exists = 0, exited = 0;
  uint32_t busy = 0;  // a bit for each of the meetings that goes on
  Meeting meetings[kWarpSize];
};

struct Copy {
  void* shared;
  const void* global;
  int bytes, group;
  bool valid;
};

struct Block {
  Lane lanes[kMaxThreads];
  Warp warps[kMaxThreads / kWarpSize];
  std::vector<Copy> copies[kMaxThreads];
  unsigned threads = 0, finished = 0;
  // Lanes that may run. `forward` and `reverse` take them first in, first out; `random` takes any.
  std::vector<Lane*> ready;
  size_t first_ready = 0;

  unsigned barrier_arrived = 0;
  Site barrier_site{"", 0};
  Votes votes, result;  // being collected; of the last barrier
};

struct Static {
  const void* key;
  size_t offset;
};

struct Machine {
  Schedule schedule;
  Device device;
  Random random;
  Block block;
  void* stacks = nullptr;
  void* main_stack = nullptr;  // the launching thread's context while lanes run
  const char* kernel = "";
  void (*body)(void*) = nullptr;
  void* closure = nullptr;
  size_t dynamic_shared = 0, shared_used = 0;
  std::vector<Static> statics;
  alignas(1024) unsigned char shared[kSharedArena];
  bool failed = false;
  std::string failure;
  std::map<std::tuple<std::string, unsigned, size_t>, uint64_t> launches;
};

std::mutex one_at_a_time;  // launches

Machine& machine() {
  static const std::unique_ptr<Machine> only = [] {
    auto made = std::make_unique<Machine>();
    check::ignore(made.get(), sizeof(Machine));
    return made;
  }();
  return *only;
}

unsigned char* stack_of(unsigned lane) {
  Machine& m = machine();
  if (!m.stacks) {
    const size_t bytes = kStackBytes * kMaxThreads;
    m.stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m.stacks == MAP_FAILED) {
      m.stacks = nullptr;
      throw std::bad_alloc();
    }
    check::ignore(m.stacks, bytes);
  }
  return static_cast<unsigned char*>(m.stacks) + kStackBytes * lane;
}

void leave_to_main() {
  void* abandoned;
  switch_stack(&abandoned, machine().main_stack);
}

std::string index_text(const Dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

std::string hex(uint32_t x) {
  char text[11];
  std::snprintf(text, sizeof text, "0x%08x", x);
  return text;
}

void make_ready(Lane* lane) {
  lane->state = Lane::ready;
  machine().block.ready.push_back(lane);
}

Lane* take_ready() {
  Machine& m = machine();
  Block& b = m.block;
  if (b.first_ready == b.ready.size()) return nullptr;
  if (m.schedule.order == Order::random)
    std::swap(b.ready[b.first_ready], b.ready[b.first_ready + m.random.below(b.ready.size() - b.first_ready)]);
  Lane* lane = b.ready[b.first_ready++];
  if (b.first_ready == b.ready.size()) {
    b.ready.clear();
    b.first_ready = 0;
  }
  return lane;
}

// Nobody can run, yet not everyone has finished.
[[noreturn]] void report_deadlock() {
  const Block& b = machine().block;
  std::string what = "deadlock: no thread can go on";
  int listed = 0;
  for (unsigned i = 0; i < b.threads && listed < 8; ++i) {
    const Lane& lane = b.lanes[i];
    if (lane.state != Lane::waiting) continue;
    if (i > 0 && b.lanes[i - 1].state == Lane::waiting && b.lanes[i - 1].waits_at.line == lane.waits_at.line &&
        b.lanes[i - 1].waits_at.file == lane.waits_at.file)
      continue;  // as its neighbour
    what += "; thread " + index_text(lane.thread) + " waits in " + lane.waits_for + " at " + describe(lane.waits_at);
    ++listed;
  }
  fail(what);
}

// Goes to another lane that may run; the current one continues when it is made ready again.
void run_others() {
  Block& b = machine().block;
  Lane* self = current;
  Lane* next = take_ready();
  if (!next) {
    if (b.finished == b.threads) leave_to_main();
    report_deadlock();
  }
  if (next == self) return;
  current = next;
  switch_stack(&self->stack_pointer, next->stack_pointer);
}

void wait(const char* kind, Site site) {
  current->state = Lane::waiting;
  current->waits_for = kind;
  current->waits_at = site;
  run_others();
}

// All lanes of a meeting are there; `here` are those that have not exited, `last` the one that runs.
void finish_meeting(Warp& warp, Lane* lanes, int index, uint32_t here, const Lane* last) {
  const Meeting& meeting = warp.meetings[index];
  meeting.complete(meeting.arguments, here);
  warp.busy &= ~(1u << index);
  const bool backwards = machine().schedule.order == Order::reverse;
  for (int k = 0; k < kWarpSize; ++k) {
    const int i = backwards ? kWarpSize - 1 - k : k;
    if ((here >> i & 1) && &lanes[i] != last) make_ready(&lanes[i]);
  }
}

void finish_barrier(const Lane* last) {
  Block& b = machine().block;
  check::barrier();
  b.result = b.votes;
  b.votes = Votes{};
  b.barrier_arrived = 0;
  const bool backwards = machine().schedule.order == Order::reverse;
  for (unsigned k = 0; k < b.threads; ++k) {
    Lane* lane = &b.lanes[backwards ? b.threads - 1 - k : k];
    if (lane != last) make_ready(lane);
  }
}

void finish_lane() {
  Block& b = machine().block;
  if (*reinterpret_cast<uint64_t*>(stack_of(current->index)) != kStackGuard)
    fail("the emulator's stack of " + std::to_string(kStackBytes >> 10) + " KiB overflowed");
  if (b.barrier_arrived > 0) fail("the thread returns while others wait at the barrier of " + describe(b.barrier_site));
  check::lane_end();
  for (const Copy& copy : b.copies[current->index])  // the hardware would still finish them
    if (machine().schedule.lazy_copies && copy.valid) std::memcpy(copy.shared, copy.global, copy.bytes);
  current->state = Lane::finished;
  ++b.finished;
  Warp& warp = b.warps[current->warp()];
  warp.exited |= 1u << current->lane();
  for (uint32_t busy = warp.busy; busy; busy &= busy - 1) {
    const int i = __builtin_ctz(busy);
    const uint32_t expected = warp.meetings[i].mask & warp.exists & ~warp.exited;
    if (expected && warp.meetings[i].arrived == expected)
      finish_meeting(warp, &b.lanes[current->warp() * kWarpSize], i, expected, nullptr);
  }
  run_others();
}

void lane_main() {
  Machine& m = machine();
  m.body(m.closure);
  finish_lane();
  __builtin_unreachable();
}

void run_block() {
  Machine& m = machine();
  Block& b = m.block;
  b.threads = static_cast<unsigned>(block_size.count());
  b.finished = b.barrier_arrived = 0;
  b.ready.clear();
  b.first_ready = 0;
  b.votes = Votes{};
  const unsigned warps = (b.threads + kWarpSize - 1) / kWarpSize;
  for (unsigned w = 0; w < warps; ++w) {
    b.warps[w].exists = b.warps[w].exited = b.warps[w].busy = 0;
  }
  std::memset(m.shared, kPoison, m.shared_used);
  check::block_begin(m.shared, m.shared_used);
  for (unsigned i = 0; i < b.threads; ++i) {
    Lane& lane = b.lanes[i];
    lane = Lane{};
    lane.index = i;
    lane.thread = Dim3(i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y);
    b.warps[i / kWarpSize].exists |= 1u << i % kWarpSize;
    b.copies[i].clear();
    unsigned char* stack = stack_of(i);
    *reinterpret_cast<uint64_t*>(stack) = kStackGuard;
    const size_t top = kStackBytes - i * kStagger % 8192;
    lane.stack_pointer = make_stack(stack + 64, top - 64, &lane_main);
  }
  const bool backwards = m.schedule.order == Order::reverse;
  for (unsigned k = 0; k < b.threads; ++k) make_ready(&b.lanes[backwards ? b.threads - 1 - k : k]);
  current = take_ready();
  switch_stack(&m.main_stack, current->stack_pointer);
  current = nullptr;
}

void check_launch(const Dim3& grid, const Dim3& block, size_t shared) {
  const auto refuse = [](const std::string& why) {
    throw Error("launch of " + std::string(machine().kernel) + ": " + why);
  };
  if (grid.count() == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    refuse("grid " + index_text(grid) + "; allowed are 1 to (2147483647, 65535, 65535)");
  if (block.count() == 0 || block.count() > kMaxThreads || block.z > 64)
    refuse("block " + index_text(block) + "; allowed are 1 to 1024 threads");
  if (shared > machine().device.shared_limit)
    refuse(std::to_string(shared) + " bytes of dynamic shared memory; the device has " +
           std::to_string(machine().device.shared_limit));
}

}  // namespace

Schedule& schedule() { return machine().schedule; }
Device& device() { return machine().device; }

std::string describe(const Site& site) {
  const char* name = std::strrchr(site.file, '/');
  return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string describe_current() {
  if (!current) return "the host";
  return "thread " + index_text(current->thread) + " of block " + index_text(block_index);
}

std::string short_name(std::string_view pretty) {
  const size_t begin = pretty.find("kernel = ") + 9;
  const std::string_view whole = pretty.substr(begin, pretty.rfind(']') - begin);
  std::string out;
  for (const char c : whole) {
    if (c == ':' && !out.empty() && out.back() == ':') {  // a namespace: back to where its name began
      out.pop_back();
      const auto is_name = [](char k) {
        return std::isalnum(static_cast<unsigned char>(k)) || k == '_' || k == '{' || k == '}';
      };
      while (!out.empty() && is_name(out.back())) out.pop_back();
    } else if (c != '&' && c != '(' && c != ')') {
      out += c;
    }
  }
  return out;
}

void fail(const std::string& what) {
  Machine& m = machine();
  const std::string sentence = std::string(m.kernel) + ": " + what + ", in " + describe_current();
  if (!current) throw Error(sentence);
  m.failed = true;
  m.failure = sentence;
  leave_to_main();
  __builtin_unreachable();
}

std::vector<Launched> launches() {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  std::vector<Launched> out;
  for (const auto& [shape, times] : machine().launches)
    out.push_back({std::get<0>(shape), std::get<1>(shape), std::get<2>(shape), times});
  return out;
}

void launch(const char* kernel, Dim3 grid, Dim3 block, size_t dynamic_shared, void (*body)(void*), void* closure,
            size_t closure_bytes) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  Machine& m = machine();
  m.kernel = kernel;
  check_launch(grid, block, dynamic_shared);
  ++m.launches[{kernel, static_cast<unsigned>(block.count()), dynamic_shared}];
  m.body = body;
  m.closure = closure;
  m.dynamic_shared = m.shared_used = dynamic_shared;
  m.statics.clear();
  m.failed = false;
  m.random.state = m.schedule.seed;
  grid_size = grid;
  block_size = block;
  check::launch_begin(kernel, closure, closure_bytes);

  const size_t blocks = grid.count();
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = m.schedule.order == Order::reverse ? blocks - 1 - i : i;
  if (m.schedule.order == Order::random)
    for (size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[m.random.below(i)]);
  for (const size_t i : order) {
    block_index = Dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                       static_cast<unsigned>(i / grid.x / grid.y));
    run_block();
    if (m.failed) break;
    check::block_end();
  }
  check::launch_end();
  if (m.failed) throw Error(m.failure);
}

void* shared_static(const void* key, size_t bytes, size_t alignment) {
  Machine& m = machine();
  for (const Static& s : m.statics)
    if (s.key == key) return m.shared + s.offset;
  const size_t offset = (m.shared_used + alignment - 1) / alignment * alignment;
  if (offset + bytes > m.device.shared_limit)
    fail("more than " + std::to_string(m.device.shared_limit) + " bytes of shared memory");
  std::memset(m.shared + m.shared_used, kPoison, offset + bytes - m.shared_used);
  m.shared_used = offset + bytes;
  m.statics.push_back({key, offset});
  check::shared_added(m.shared + offset, bytes);
  return m.shared + offset;
}

void* shared_dynamic() { return machine().shared; }

bool is_shared(const void* address, size_t bytes) {
  const Machine& m = machine();
  const auto* p = static_cast<const unsigned char*>(address);
  return p >= m.shared && p + bytes <= m.shared + m.shared_used;
}

void collective(const char* kind, Site site, uint32_t mask, void* arguments, Complete complete) {
  Block& b = machine().block;
  Warp& warp = b.warps[current->warp()];
  const uint32_t self = 1u << current->lane();
  if (!(mask & self)) fail(std::string(kind) + " at " + describe(site) + ": the lane is not in its own mask");
  int mine = -1;
  for (uint32_t busy = warp.busy; busy; busy &= busy - 1) {
    const Meeting& other = warp.meetings[__builtin_ctz(busy)];
    if (!(other.mask & mask)) continue;
    if (other.mask != mask || other.site.line != site.line || std::strcmp(other.site.file, site.file) != 0 ||
        std::strcmp(other.kind, kind) != 0)
      fail("divergence: " + std::string(kind) + " at " + describe(site) + " with mask " + hex(mask) +
           ", while lanes that it names wait in " + other.kind + " at " + describe(other.site) + " with mask " +
           hex(other.mask));
    mine = __builtin_ctz(busy);
    break;
  }
  if (mine < 0) {
    mine = __builtin_ctz(~warp.busy);
    warp.busy |= 1u << mine;
    Meeting& meeting = warp.meetings[mine];
    meeting.kind = kind;
    meeting.site = site;
    meeting.mask = mask;
    meeting.arrived = 0;
    meeting.complete = complete;
  }
  Meeting& meeting = warp.meetings[mine];
  meeting.arrived |= self;
  meeting.arguments[current->lane()] = arguments;
  const uint32_t expected = mask & warp.exists & ~warp.exited;
  if (meeting.arrived == expected)
    finish_meeting(warp, &b.lanes[current->warp() * kWarpSize], mine, expected, current);
  else
    wait(kind, site);
}

void sync_warp(Site site, uint32_t mask) {
  collective("__syncwarp", site, mask, nullptr, [](void* const*, uint32_t here) { check::warp_sync(here); });
}

Votes barrier(Site site, bool predicate) {
  Block& b = machine().block;
  if (b.barrier_arrived > 0 && (b.barrier_site.line != site.line || std::strcmp(b.barrier_site.file, site.file) != 0))
    fail("divergence: __syncthreads at " + describe(site) + ", while other threads wait at the one of " +
         describe(b.barrier_site));
  if (b.finished > 0)
    fail("__syncthreads at " + describe(site) + ", but " + std::to_string(b.finished) + " threads have returned");
  b.barrier_site = site;
  b.votes.count += predicate;
  b.votes.any |= predicate;
  b.votes.all &= predicate;
  if (++b.barrier_arrived == b.threads)
    finish_barrier(current);
  else
    wait("__syncthreads", site);
  return b.result;
}

void check_aligned(const void* address, size_t bytes, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail("misaligned " + std::to_string(bytes) + "-byte " + what + " at " + describe(site));
}

void copy_async(void* shared, const void* global, int bytes, bool valid, Site site) {
  check_aligned(shared, bytes, "cp.async (shared address)", site);
  if (valid) check_aligned(global, bytes, "cp.async (global address)", site);
  if (!is_shared(shared, bytes)) fail("cp.async at " + describe(site) + " writes outside the block's shared memory");
  check::copy_issued(shared, global, bytes, valid, site);
  Machine& m = machine();
  m.block.copies[current->index].push_back({shared, global, bytes, current->committed, valid});
  if (m.schedule.lazy_copies)
    std::memset(shared, kPoison, bytes);
  else if (valid)
    std::memcpy(shared, global, bytes);
  else
    std::memset(shared, 0, bytes);
}

void copy_async_commit() { ++current->committed; }

void copy_async_wait(int groups_left, Site) {
  Machine& m = machine();
  auto& copies = m.block.copies[current->index];
  size_t kept = 0;
  for (const Copy& copy : copies) {
    if (copy.group >= current->committed - groups_left) {
      copies[kept++] = copy;
      continue;
    }
    check::copy_waited(copy.shared, copy.bytes);
    if (!m.schedule.lazy_copies) continue;
    if (copy.valid)
      std::memcpy(copy.shared, copy.global, copy.bytes);
    else
      std::memset(copy.shared, 0, copy.bytes);
  }
  copies.resize(kept);
}

}  // namespace simt
