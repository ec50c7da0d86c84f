// A stack of its own and the change from one to another.
#pragma once
#include <cstddef>

#if defined(__x86_64__)

namespace emulator {
struct Context {
    void *top; // of a stack, where what the caller owns was pushed
};
} // namespace emulator
extern "C" void emulator_switch(emulator::Context *from, const emulator::Context *to);
namespace emulator {
inline void switch_to(Context &from, const Context &to) { emulator_switch(&from, &to); }
inline void start(Context &context, char *stack, size_t bytes, void (*body)()) {
    auto *top = reinterpret_cast<void **>(stack + bytes); // a multiple of 16
    top[-2] = reinterpret_cast<void *>(body);             // returned to by the first switch
    context.top = top - 8;                                // beneath six registers
}
} // namespace emulator

#else // anywhere else: ten times slower, for system calls about signals

#include <ucontext.h>
namespace emulator {
using Context = ucontext_t;
inline void switch_to(Context &from, const Context &to) { swapcontext(&from, &to); }
inline void start(Context &context, char *stack, size_t bytes, void (*body)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = bytes, context.uc_link = nullptr;
    makecontext(&context, body, 0);
}
} // namespace emulator

#endif
