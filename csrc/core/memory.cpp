#include "core/memory.h"

#if defined(__linux__)
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif
#endif

namespace fastgpt {

void advise_huge_pages(void* address, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = 4096, first = reinterpret_cast<uintptr_t>(address);
  const uintptr_t begin = (first + page - 1) / page * page, end = (first + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

#if defined(__linux__)
namespace {

// Whether the administrator has switched huge pages off, which MADV_COLLAPSE would not ask.
bool never() {
  char setting[64] = {};
  std::FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r");
  if (!file) return true;
  const bool read = std::fgets(setting, sizeof setting, file) != nullptr;
  std::fclose(file);
  return !read || std::strstr(setting, "[never]");
}

}  // namespace
#endif

void move_to_huge_pages(void* address, int64_t bytes) {
#if defined(__linux__)
  if (never()) return;
  advise_huge_pages(address, bytes);
  const uintptr_t page = 2 << 20, first = reinterpret_cast<uintptr_t>(address);
  const uintptr_t end = (first + static_cast<uintptr_t>(bytes)) / page * page;
  // One by one: a page that cannot be moved must not keep the rest.
  for (uintptr_t at = (first + page - 1) / page * page; at < end; at += page)
    madvise(reinterpret_cast<void*>(at), page, MADV_COLLAPSE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace fastgpt
