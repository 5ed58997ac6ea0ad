// Advice to the operating system about large blocks of memory.
#pragma once

#include <cstdint>

namespace fastgpt {

// Asks for huge pages under [address, address + bytes), which is fresh memory. A hint: nothing happens where the system
// has none to give. Touching 206 MB for the first time costs 100 ms in 4 kB pages and 20 ms in 2 MB pages.
void advise_huge_pages(void* address, int64_t bytes);

// Moves what lies there already into huge pages, as far as whole ones fit in: for memory that stays and is read again
// and again. Costs a copy. Nothing happens where the system has none, or was told (by "never") not to use them.
void move_to_huge_pages(void* address, int64_t bytes);

}  // namespace fastgpt
