#include "core/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
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

}  // namespace fastgpt
