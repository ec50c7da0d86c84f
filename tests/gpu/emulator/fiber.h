// A stack of its own and the change from one to another.
#pragma once
#include <cstddef>

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)

#ifdef __AVX512F__
#define EMULATOR_MORE_REGISTERS                                                                                              \
    "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28",     \
        "xmm29", "xmm30", "xmm31", "k1", "k2", "k3", "k4", "k5", "k6", "k7",
#else
#define EMULATOR_MORE_REGISTERS
#endif
#ifdef __AVX__
#define EMULATOR_CLEAN_REGISTERS "vzeroupper\n" // or the C library's functions without AVX are slow
#else
#define EMULATOR_CLEAN_REGISTERS
#endif

namespace emulator {

struct Context {
    void **top; // of the stack that was left: where to go on, and what the compiler may not be told to give up
};

// A jump rather than a return, and written where it is used: the processor foresees no return to another stack. Whatever else
// is in registers, the compiler keeps elsewhere. The stack beneath its top is not used (-mno-red-zone).
[[gnu::always_inline]] inline void switch_to(Context &left, Context &next) {
    Context *from = &left, *to = &next;
    asm volatile(EMULATOR_CLEAN_REGISTERS
                 "push %%rbp\n lea 1f(%%rip), %%rax\n push %%rax\n mov %%rsp, (%0)\n"
                 "mov (%1), %%rsp\n pop %%rax\n jmp *%%rax\n"
                 "1: pop %%rbp\n"
                 : "+D"(from), "+S"(to)
                 :
                 : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1", "xmm2", "xmm3",
                   "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
                   EMULATOR_MORE_REGISTERS "memory", "cc");
}
// `end` is a multiple of 16.
inline void start(Context &context, char *, char *end, void (*body)()) {
    context.top = reinterpret_cast<void **>(end) - 2; // one place to be jumped to, and as after a call
    context.top[0] = reinterpret_cast<void *>(body);
}

} // namespace emulator

#else // anywhere else: ten times slower, for system calls about signals

#include <ucontext.h>
namespace emulator {
using Context = ucontext_t;
inline void switch_to(Context &left, Context &next) { swapcontext(&left, &next); }
inline void start(Context &context, char *stack, char *end, void (*body)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = end - stack, context.uc_link = nullptr;
    makecontext(&context, body, 0);
}
} // namespace emulator

#endif
