// What kernels compiled for the CPU and the stand-in for the driver know of each other.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#pragma GCC visibility push(default)
namespace emulator {

constexpr unsigned LANES = 32, MOST_THREADS = 1024;
constexpr size_t SHARED_BY_DEFAULT = 48 << 10, MOST_SHARED = 227 << 10;

// A kernel under its name, with what unpacks its arguments, copies them for later, and tells the addresses among them.
struct Kernel {
    const char *name;
    void (*call)(void **arguments);
    std::shared_ptr<void *> (*keep)(void **arguments);
    std::vector<const void *> (*pointers)(void **arguments); // those among the arguments
    size_t shared_allowed = SHARED_BY_DEFAULT; // of dynamic shared memory, in bytes
    Kernel *next;
    static Kernel *first;

    template <class Caller> Kernel(const char *name, Caller) : name(name), call(Caller::call), keep(Caller::keep), pointers(Caller::pointers), next(first) {
        first = this;
    }
};

struct Launch {
    const Kernel *kernel;
    dim3 grid, block;
    size_t shared; // dynamic, in bytes
    void **arguments;
};

// What a kernel may ask; each of the machine's threads runs one block at a time, and of that one thread at a time.
struct Place {
    uint3 block;
    dim3 block_size, grid_size;
    char *shared; // dynamic
};
extern __thread const Place *place __attribute__((tls_model("initial-exec")));
extern __thread const uint3 *thread_index __attribute__((tls_model("initial-exec")));

// Waits for all threads of the block.
void wait_for_block();
// Waits for all lanes of the warp; the last to come calls `work` with what each of them gave, null where the warp ends early.
using Work = void (*)(void *const (&operands)[LANES]);
void with_warp(const char *name, Work work, void *operands);

// Copies into shared memory. On a GPU they arrive at any time from when they are asked for to when they are waited for; here, what
// was at the place is gone at the first, and they arrive at the last, never if they are not waited for.
void copy_later(void *to, const void *from, bool valid);
void end_group();
void wait_for_groups(size_t all_but);
// That 16 bytes lie in the block's dynamic shared memory, as the hardware wants them.
void check_shared(const void *address, const char *what);

// Ends the process with what is wrong, the kernel and the thread.
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

} // namespace emulator
#pragma GCC visibility pop
