// A switch between stacks. On x86-64 it is a dozen instructions that end in `pop; jmp`: a `ret` to an address that
// no call pushed is mispredicted each time, which made the emulator half as fast. Elsewhere, ucontext.
#pragma once

#include <cstddef>

namespace simt {

// Saves the running context and continues the one saved at `to`; returns when someone switches back.
void switch_stack(void** from, void* to);
// A context that calls `entry` (which must never return) on the stack [base, base + bytes).
void* make_stack(void* base, size_t bytes, void (*entry)());

}  // namespace simt
