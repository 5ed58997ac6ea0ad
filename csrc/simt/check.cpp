// The checker behind the checked build: a shadow for every byte of global and shared memory that a kernel may touch.
//
// The compiler reports each plain load and store (-fsanitize=thread calls the __tsan_* functions at the end of this
// file; libtsan is not linked), and the emulator reports what its own functions access. Found are accesses outside of
// every region, reads of bytes that nothing wrote, two threads at one byte with nothing to order them, bytes of a
// cp.async touched before it was waited for, and misaligned accesses.
//
// What orders two accesses: the same thread; __syncthreads between them; within a warp a chain of __syncwarps
// (a vector clock for each lane); across blocks, __threadfence and an atomic on one side, an atomic on the same
// address and __threadfence on the other. Shuffles and votes order nothing: CUDA does not promise that they do.
// Two threads that write the same value are no race.
#include "simt/check.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <unordered_map>

namespace simt::check {

// Asks binutils' addr2line, which comes with g++. Of the functions inlined into one another at an address, the one that
// stands in a .cu file is where a person looks.
std::vector<std::string> look_up(const std::vector<const void*>& counters) {
  std::vector<std::string> places;
  std::string command;
  for (const void* pc : counters) {
    char text[32];
    std::snprintf(text, sizeof text, "pc %p", pc);
    places.push_back(text);
    Dl_info info;
    if (!dladdr(pc, &info)) continue;
    // A return address is one past the call.
    const auto offset = static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1;
    if (command.empty()) command = "addr2line -a -i -e '" + std::string(info.dli_fname) + "'";
    std::snprintf(text, sizeof text, " 0x%zx", static_cast<size_t>(offset));
    command += text;
  }
  FILE* pipe = command.empty() ? nullptr : popen((command + " 2>/dev/null").c_str(), "r");
  if (!pipe) return places;
  char line[4096];
  int at = -1;
  bool in_kernel_file = false, any = false;
  while (std::fgets(line, sizeof line, pipe)) {
    std::string text(line);
    if (text.compare(0, 2, "0x") == 0) {
      ++at;
      in_kernel_file = any = false;
      continue;
    }
    text = text.substr(0, text.find_first_of(" \n"));
    if (at < 0 || at >= static_cast<int>(places.size()) || in_kernel_file || text.find('?') != std::string::npos)
      continue;
    const std::string name = text.substr(text.rfind('/') + 1);
    in_kernel_file = name.find(".cu:") != std::string::npos;
    if (in_kernel_file || !any) places[at] = name;
    any = true;
  }
  pclose(pipe);
  return places;
}

namespace {

// Where in a source an access stands: named, or a program counter for the host to look up.
struct Place {
  Site site;
  const void* pc;
};

// Who touched a byte, and when.
struct Mark {
  uint32_t block = 0;    // counted over all launches; 0: nobody
  uint32_t barrier = 0;  // barriers that the block had passed
  uint32_t clock = 0;    // of the lane, in its warp
  uint16_t thread = 0;
  bool atomic = false;
  Place place{{"", 0}, nullptr};
};

struct Cell {
  Mark write, read, other_read;
  uint32_t written_by = 0;  // shared memory: the block that wrote it, or 0
  bool written = false;     // global memory
  bool in_flight = false;   // a cp.async that was not waited for
};

struct Region {
  const char* begin;
  const char* end;
  std::unique_ptr<Cell[]> cells;
};

struct Range {
  const char* begin;
  const char* end;
  bool holds(const char* p) const { return p >= begin && p < end; }
};

// A write that found another one unordered: no race if it leaves the bytes as they are.
struct Suspect {
  const char* address = nullptr;
  size_t bytes = 0;
  char before[16];
  std::string report;
};

struct Published {
  uint32_t block, barrier;
  uint16_t thread;
};

struct RequestKey {
  const void* pc;
  const char* file;
  int line, warp;
  int64_t occurrence;
  bool shared;
  Access kind;
  bool operator<(const RequestKey& o) const {
    return std::tie(pc, file, line, warp, occurrence, shared, kind) <
           std::tie(o.pc, o.file, o.line, o.warp, o.occurrence, o.shared, o.kind);
  }
};
struct Touch {
  const char* address;
  int bytes, lane;
};

struct Checker {
  std::map<const char*, Region> regions;  // by end
  std::vector<Range> ignored, readable;
  Range arguments{nullptr, nullptr};
  Range shared{nullptr, nullptr};
  std::unique_ptr<Cell[]> shared_cells;
  size_t shared_cell_count = 0;

  bool active = false;
  std::string kernel;
  uint32_t block = 0, first_block = 1, barriers = 0;
  uint32_t clocks[kMaxThreads][kWarpSize];
  bool fenced[kMaxThreads];
  std::map<const char*, std::vector<Published>> published;  // by the address of the atomic
  std::vector<Published> acquired[kMaxThreads];
  Suspect suspect;

  bool counting = false;
  std::map<RequestKey, std::vector<Touch>> block_requests;
  std::map<std::tuple<const void*, const char*, int, bool, Access>, int64_t> occurrences[kMaxThreads];
  std::map<std::tuple<std::string, const void*, const char*, int, bool, Access>, Requests> totals;
};

Checker& checker() {
  static const std::unique_ptr<Checker> only = [] {
    auto made = std::make_unique<Checker>();
    // Constants and variables of this library, which a kernel's code may read.
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
          const auto self = reinterpret_cast<uintptr_t>(&checker);
          std::vector<Range> ranges;
          bool mine = false;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& segment = info->dlpi_phdr[i];
            if (segment.p_type != PT_LOAD) continue;
            const auto begin = static_cast<uintptr_t>(info->dlpi_addr + segment.p_vaddr);
            const auto end = begin + segment.p_memsz;
            mine |= self >= begin && self < end;
            ranges.push_back({reinterpret_cast<const char*>(begin), reinterpret_cast<const char*>(end)});
          }
          if (mine) *static_cast<std::vector<Range>*>(data) = ranges;
          return mine ? 1 : 0;
        },
        &made->readable);
    return made;
  }();
  return *only;
}

std::string describe(const Place& place) {
  if (place.site.line) return simt::describe(place.site);
  static std::map<const void*, std::string> known;
  std::string& found = known[place.pc];
  if (found.empty()) found = look_up({place.pc})[0];
  return found;
}

std::string who(const Mark& mark) {
  return "thread " + std::to_string(mark.thread) + " of " +
         (mark.block == checker().block ? "the same block" : "another block") + " at " + describe(mark.place);
}

const char* verb(Access kind) {
  return kind == Access::read ? "read" : kind == Access::write ? "write" : "atomic operation";
}

[[noreturn]] void report(const std::string& what, const Place& place) { fail(what + " at " + describe(place)); }

Mark mark_now(Access kind, const Place& place) {
  const Checker& c = checker();
  const uint32_t thread = current->index;
  return {
      c.block, c.barriers, c.clocks[thread][thread % kWarpSize], static_cast<uint16_t>(thread), kind == Access::atomic,
      place};
}

// Whether what `mark` did comes before what the current thread does now.
bool ordered(const Mark& mark, bool is_shared) {
  const Checker& c = checker();
  if (mark.block < (is_shared ? c.block : c.first_block)) return true;  // nobody; an earlier launch, or block
  const uint32_t self = current->index;
  if (mark.block != c.block) {
    for (const Published& p : c.acquired[self])
      if (p.block == mark.block && (mark.barrier < p.barrier || mark.thread == p.thread)) return true;
    return false;
  }
  if (mark.thread == self || mark.barrier < c.barriers) return true;
  return mark.thread / kWarpSize == self / kWarpSize && c.clocks[self][mark.thread % kWarpSize] >= mark.clock;
}

// A suspected write has happened by now.
void settle_suspect() {
  Suspect& s = checker().suspect;
  if (!s.address) return;
  const bool changed = std::memcmp(s.address, s.before, s.bytes) != 0;
  s.address = nullptr;
  if (changed) fail(s.report);
}

Cell* cells_of(const char* address, size_t bytes, bool* is_shared) {
  Checker& c = checker();
  if (c.shared.holds(address)) {
    *is_shared = true;
    return address + bytes <= c.shared.end ? &c.shared_cells[address - c.shared.begin] : nullptr;
  }
  *is_shared = false;
  const auto found = c.regions.upper_bound(address);
  if (found == c.regions.end() || address < found->second.begin || address + bytes > found->second.end) return nullptr;
  return &found->second.cells[address - found->second.begin];
}

void note_request(const char* address, size_t bytes, Access kind, bool is_shared, const Place& place) {
  Checker& c = checker();
  const auto key = std::make_tuple(place.pc, place.site.file, place.site.line, is_shared, kind);
  const int64_t occurrence = c.occurrences[current->index][key]++;
  c.block_requests[{place.pc, place.site.file, place.site.line, static_cast<int>(current->warp()), occurrence,
                    is_shared, kind}]
      .push_back({address, static_cast<int>(bytes), static_cast<int>(current->lane())});
}

void check_access(const char* address, size_t bytes, Access kind, const Place& place) {
  Checker& c = checker();
  if (!c.active || !current) return;
  settle_suspect();
  bool is_shared = false;
  Cell* cells = cells_of(address, bytes, &is_shared);
  if (!cells) {
    const Range arena{c.shared.begin, c.shared.begin + kSharedArena};
    if (!arena.holds(address)) {
      for (const Range& range : c.ignored)
        if (range.holds(address)) return;
      if (kind == Access::read) {
        if (c.arguments.holds(address)) return;
        for (const Range& range : c.readable)
          if (range.holds(address)) return;
      }
    }
    std::string what = std::string("out of bounds: ") + verb(kind) + " of " + std::to_string(bytes) + " bytes";
    if (arena.holds(address)) report(what + " past the end of the block's shared memory", place);
    // The nearest region before the address tells by how far.
    const char* nearest = nullptr;
    for (const auto& [end, region] : c.regions)
      if (region.begin <= address && (!nearest || region.end > nearest)) nearest = region.end;
    if (nearest) what += ", " + std::to_string(address - nearest) + " bytes past the end of the nearest tensor";
    report(what, place);
  }
  if (c.counting) note_request(address, bytes, kind, is_shared, place);
  const Mark now = mark_now(kind, place);
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = cells[i];
    if (cell.in_flight && cell.write.block == c.block)
      report(std::string(verb(kind)) + " of bytes that a cp.async of " + who(cell.write) +
                 " may still write: it was not waited for",
             place);
    if (kind != Access::write && !(is_shared ? cell.written_by == c.block : cell.written))
      report("uninitialised " + std::string(is_shared ? "shared" : "global") +
                 " memory: read of a byte that nothing wrote",
             place);
    const bool atomics = kind == Access::atomic && cell.write.atomic;
    if (!atomics && !ordered(cell.write, is_shared)) {
      const std::string what = std::string("race: ") + verb(kind) + " at " + describe(place) + " of a byte that " +
                               who(cell.write) + " wrote, with nothing to order them";
      if (kind == Access::write && !cell.write.atomic && bytes <= sizeof c.suspect.before) {
        if (!c.suspect.address) {
          c.suspect.address = address;
          c.suspect.bytes = bytes;
          std::memcpy(c.suspect.before, address, bytes);
          c.suspect.report = what;
        }
      } else {
        fail(what);
      }
    }
    if (kind != Access::read)
      for (const Mark* read : {&cell.read, &cell.other_read})
        if (!ordered(*read, is_shared) && !(kind == Access::atomic && read->atomic))
          fail(std::string("race: ") + verb(kind) + " at " + describe(place) + " of a byte that " + who(*read) +
               " reads, with nothing to order them");
    if (kind == Access::read) {
      // Two readers are remembered: the latest, and the latest of another thread.
      if (cell.read.block == now.block && cell.read.thread != now.thread) cell.other_read = cell.read;
      cell.read = now;
    } else {
      cell.write = now;
      cell.written = true;
      cell.in_flight = false;
      cell.written_by = c.block;
    }
  }
  if (kind == Access::atomic) {
    auto& published = c.published[address];
    const uint32_t self = current->index;
    for (const Published& p : published) c.acquired[self].push_back(p);
    if (c.fenced[self]) published.push_back({c.block, c.barriers, static_cast<uint16_t>(self)});
  }
}

int64_t wavefronts(const std::vector<Touch>& touches, int64_t* ideal) {
  // 4-byte accesses of a warp take one pass, 8-byte ones two, 16-byte ones four; in a pass, different words of one
  // bank follow one another.
  const int size = touches[0].bytes, lanes_a_pass = size <= 4 ? 32 : size <= 8 ? 16 : 8;
  int64_t total = 0;
  *ideal = 0;
  for (int first = 0; first < kWarpSize; first += lanes_a_pass) {
    std::vector<uintptr_t> words[32];
    int64_t most = 0;
    for (const Touch& t : touches) {
      if (t.lane < first || t.lane >= first + lanes_a_pass) continue;
      for (uintptr_t word = reinterpret_cast<uintptr_t>(t.address) / 4;
           word * 4 < reinterpret_cast<uintptr_t>(t.address) + t.bytes; ++word) {
        auto& bank = words[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        most = std::max<int64_t>(most, bank.size());
      }
    }
    total += most;
    *ideal += most > 0;
  }
  return total;
}

int64_t sectors(const std::vector<Touch>& touches, int64_t* bytes, int64_t* ideal) {
  std::vector<uintptr_t> sectors, all;
  for (const Touch& t : touches)
    for (int i = 0; i < t.bytes; ++i) {
      const auto address = reinterpret_cast<uintptr_t>(t.address) + i;
      all.push_back(address);
      sectors.push_back(address / 32);
    }
  const auto unique = [](std::vector<uintptr_t>& v) {
    std::sort(v.begin(), v.end());
    v.erase(std::unique(v.begin(), v.end()), v.end());
    return static_cast<int64_t>(v.size());
  };
  *bytes = unique(all);
  *ideal = (*bytes + 31) / 32;
  return unique(sectors);
}

}  // namespace

void ignore(const void* address, size_t bytes) {
  const auto* p = static_cast<const char*>(address);
  checker().ignored.push_back({p, p + bytes});
}

void add_region(const void* address, size_t bytes, bool written) {
  if (bytes == 0) return;
  Checker& c = checker();
  const auto* begin = static_cast<const char*>(address);
  const char* end = begin + bytes;
  // A view may overlap one that is known already: the region grows to hold both.
  for (auto it = c.regions.upper_bound(begin); it != c.regions.end() && it->second.begin < end;) {
    begin = std::min(begin, it->second.begin);
    end = std::max(end, it->second.end);
    it = c.regions.erase(it);
  }
  Region region{begin, end, std::make_unique<Cell[]>(end - begin)};
  for (char const* p = begin; p < end; ++p) region.cells[p - begin].written = written;
  c.regions.emplace(end, std::move(region));
}

void set_written(const void* address, bool written) {
  Checker& c = checker();
  const auto* p = static_cast<const char*>(address);
  const auto found = c.regions.upper_bound(p);
  if (found == c.regions.end() || p < found->second.begin) return;
  for (const char* q = found->second.begin; q < found->second.end; ++q)
    found->second.cells[q - found->second.begin].written = written;
}

void clear_regions() { checker().regions.clear(); }

void launch_begin(const char* kernel, const void* arguments, size_t bytes) {
  Checker& c = checker();
  c.kernel = kernel;
  c.arguments = {static_cast<const char*>(arguments), static_cast<const char*>(arguments) + bytes};
  c.first_block = c.block + 1;
  c.published.clear();
  c.suspect.address = nullptr;
  c.active = true;
}

void launch_end() { checker().active = false; }

void block_begin(const void* shared, size_t bytes) {
  Checker& c = checker();
  ++c.block;
  c.barriers = 0;
  std::memset(c.clocks, 0, sizeof c.clocks);
  for (auto& lane : c.clocks) lane[(&lane - c.clocks) % kWarpSize] = 1;
  std::memset(c.fenced, 0, sizeof c.fenced);
  for (auto& acquired : c.acquired) acquired.clear();
  c.shared = {static_cast<const char*>(shared), static_cast<const char*>(shared) + bytes};
  if (c.shared_cell_count < bytes) {
    c.shared_cells = std::make_unique<Cell[]>(bytes);
    c.shared_cell_count = bytes;
  }
}

void shared_added(const void* shared, size_t bytes) {
  Checker& c = checker();
  const char* end = static_cast<const char*>(shared) + bytes;
  const size_t total = end - c.shared.begin;
  c.shared.end = end;
  if (total <= c.shared_cell_count) return;
  auto grown = std::make_unique<Cell[]>(total);
  std::copy_n(c.shared_cells.get(), c.shared_cell_count, grown.get());
  c.shared_cells = std::move(grown);
  c.shared_cell_count = total;
}

void block_end() {
  settle_suspect();
  Checker& c = checker();
  for (const auto& [key, touches] : c.block_requests) {
    Requests& total = c.totals[{c.kernel, key.pc, key.file, key.line, key.shared, key.kind}];
    if (total.requests++ == 0) {
      total.kernel = c.kernel;
      total.site = {key.file, key.line};
      total.pc = key.pc;
      total.shared = key.shared;
      total.kind = key.kind;
    }
    int64_t ideal = 0, bytes = 0;
    const int64_t in_sectors = sectors(touches, &bytes, &ideal);
    total.bytes += bytes;
    total.moved += key.shared ? wavefronts(touches, &ideal) : in_sectors;
    total.ideal += ideal;
  }
  c.block_requests.clear();
  for (auto& lane : c.occurrences) lane.clear();
}

void lane_end() { settle_suspect(); }

void barrier() {
  settle_suspect();
  ++checker().barriers;
}

void warp_sync(uint32_t mask) {
  settle_suspect();
  auto* clocks = &checker().clocks[current->index / kWarpSize * kWarpSize];
  uint32_t joined[kWarpSize] = {};
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (mask >> lane & 1)
      for (int i = 0; i < kWarpSize; ++i) joined[i] = std::max(joined[i], clocks[lane][i]);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    std::copy_n(joined, kWarpSize, clocks[lane]);
    ++clocks[lane][lane];
  }
}

void fence() {
  if (current) checker().fenced[current->index] = true;
}

void access(const void* address, size_t bytes, Access kind, Site site) {
  check_access(static_cast<const char*>(address), bytes, kind, {site, nullptr});
}

void copy_issued(void* shared, const void* global, int bytes, bool valid, Site site) {
  if (valid) access(global, bytes, Access::read, site);
  access(shared, bytes, Access::write, site);
  settle_suspect();
  bool is_shared;
  Cell* cells = cells_of(static_cast<const char*>(shared), bytes, &is_shared);
  for (int i = 0; i < bytes; ++i) cells[i].in_flight = true;
}

void copy_waited(void* shared, int bytes) {
  bool is_shared;
  Cell* cells = cells_of(static_cast<const char*>(shared), bytes, &is_shared);
  for (int i = 0; i < bytes; ++i) {
    const Place issued = cells[i].write.place;
    cells[i].in_flight = false;
    cells[i].write = mark_now(Access::write, issued);  // seen by others after the next barrier
  }
}

std::vector<Requests> requests() {
  std::vector<Requests> out;
  for (const auto& [key, total] : checker().totals) out.push_back(total);
  return out;
}
void clear_requests() { checker().totals.clear(); }
void count_requests(bool enabled) { checker().counting = enabled; }

namespace {
inline void plain(const void* address, size_t bytes, Access kind, const void* pc, bool aligned) {
  if (!current) return;  // host code of the same file
  if (aligned && reinterpret_cast<uintptr_t>(address) % bytes)
    report("misaligned " + std::to_string(bytes) + "-byte " + verb(kind), {{"", 0}, pc});
  check_access(static_cast<const char*>(address), bytes, kind, {{"", 0}, pc});
}
}  // namespace

}  // namespace simt::check

// --- what g++ -fsanitize=thread calls ---

using simt::check::Access;
#define PC __builtin_return_address(0)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define SIZED(n)                                                                                  \
  void __tsan_read##n(void* p) { simt::check::plain(p, n, Access::read, PC, true); }              \
  void __tsan_write##n(void* p) { simt::check::plain(p, n, Access::write, PC, true); }            \
  void __tsan_unaligned_read##n(void* p) { simt::check::plain(p, n, Access::read, PC, false); }   \
  void __tsan_unaligned_write##n(void* p) { simt::check::plain(p, n, Access::write, PC, false); } \
  void __tsan_volatile_read##n(void* p) { simt::check::plain(p, n, Access::read, PC, true); }     \
  void __tsan_volatile_write##n(void* p) { simt::check::plain(p, n, Access::write, PC, true); }
SIZED(1)
SIZED(2)
SIZED(4)
SIZED(8)
SIZED(16)
#undef SIZED
void __tsan_read_range(void* p, size_t n) { simt::check::plain(p, n, Access::read, PC, false); }
void __tsan_write_range(void* p, size_t n) { simt::check::plain(p, n, Access::write, PC, false); }
// Function-local statics with a guard.
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return *p; }
}
