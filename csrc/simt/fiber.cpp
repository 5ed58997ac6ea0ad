#include "simt/fiber.h"

#include <cstdint>

#if defined(__x86_64__)

// The registers that the System V ABI lets a callee expect back.
asm(R"(
    .text
    .globl simt_switch_stack
    .hidden simt_switch_stack
    .type simt_switch_stack, @function
simt_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmp *%rcx
    .size simt_switch_stack, .-simt_switch_stack
)");
extern "C" void simt_switch_stack(void** from, void* to);

namespace simt {

void switch_stack(void** from, void* to) { simt_switch_stack(from, to); }

void* make_stack(void* base, size_t bytes, void (*entry)()) {
  auto top = (reinterpret_cast<uintptr_t>(base) + bytes) & ~uintptr_t{15};
  auto* words = reinterpret_cast<uintptr_t*>(top);
  *--words = 0;  // the return address that `entry` finds: none; it also aligns the stack as a call would
  *--words = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--words = 0;
  return words;
}

}  // namespace simt

#else

#include <ucontext.h>

#include <new>

namespace simt {

// A context's handle is the ucontext_t kept at the foot of its stack; the launching thread's lives on its own stack.
void switch_stack(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

void* make_stack(void* base, size_t bytes, void (*entry)()) {
  auto* context = new (base) ucontext_t;
  getcontext(context);
  const size_t foot = (sizeof(ucontext_t) + 63) / 64 * 64;
  context->uc_stack.ss_sp = static_cast<char*>(base) + foot;
  context->uc_stack.ss_size = bytes - foot;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

}  // namespace simt

#endif
