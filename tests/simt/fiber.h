// A stack that can be left in the middle of a function and entered again.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#ifdef SIMT_SANITIZED
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

struct Context {
  const void* stack_bottom = nullptr;  // of the host's stack, these two are filled in by the first fiber it enters
  size_t stack_size = 0;
  void* fake_stack = nullptr;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t machine_context;
#endif
};

#if defined(__x86_64__)
// swapcontext costs a system call to keep the signal mask, which the emulator never changes.
extern "C" void simt_switch_stack(void** leave, void* enter);
asm(R"(
  .text
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
  ret
  .size simt_switch_stack, .-simt_switch_stack
)");
#endif

// Makes `context` start in `entry`, which must never return.
inline void prepare(Context& context, void (*entry)()) {
#if defined(__x86_64__)
  auto* top = reinterpret_cast<uint64_t*>(
      (reinterpret_cast<uintptr_t>(context.stack_bottom) + context.stack_size) & ~uintptr_t{15});
  top[-1] = 0;
  top[-2] = reinterpret_cast<uint64_t>(entry);
  context.stack_pointer = top - 8;  // six saved registers below the entry's address
#else
  getcontext(&context.machine_context);
  context.machine_context.uc_stack.ss_sp = const_cast<void*>(context.stack_bottom);
  context.machine_context.uc_stack.ss_size = context.stack_size;
  makecontext(&context.machine_context, entry, 0);
#endif
}

inline void switch_context(Context& leave, Context& enter) {
#ifdef SIMT_SANITIZED
  __sanitizer_start_switch_fiber(&leave.fake_stack, enter.stack_bottom, enter.stack_size);
#endif
#if defined(__x86_64__)
  simt_switch_stack(&leave.stack_pointer, enter.stack_pointer);
#else
  swapcontext(&leave.machine_context, &enter.machine_context);
#endif
#ifdef SIMT_SANITIZED
  __sanitizer_finish_switch_fiber(leave.fake_stack, nullptr, nullptr);
#endif
}

// To be called first in a fiber's entry; `host` is the context it came from, or null when it came from another fiber.
inline void entered(Context* host) {
#ifdef SIMT_SANITIZED
  const void** bottom = host == nullptr ? nullptr : &host->stack_bottom;
  __sanitizer_finish_switch_fiber(nullptr, bottom, host == nullptr ? nullptr : &host->stack_size);
#else
  (void)host;
#endif
}

}  // namespace simt
