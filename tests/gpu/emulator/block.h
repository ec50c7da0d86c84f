// A block of threads on one of the machine's threads.
#pragma once
#include "emulator.h"
#include "fiber.h"

#include <memory>
#include <random>

namespace emulator {

struct Thread {
    uint3 index;
    bool begun, done;
    char *stack;
    Context context; // while it waits
};

// Copies into shared memory that have not arrived, of one thread.
struct Copies {
    struct Copy {
        void *to;
        const void *from;
        bool valid;
    };
    std::vector<Copy> copies;
    std::vector<size_t> groups; // how many copies there were when each was committed
};

// The stacks, the shared memory and the order of a block's threads. Threads run until they wait: a warp's lanes in turn, then
// the next warp. What runs first is drawn anew at each barrier, from EMULATOR_SEED; 0 is the natural order.
class Block {
  public:
    Block();
    ~Block();
    void run(const Launch &launch, uint3 index);
    static Block &own() { return own_block ? *own_block : make_own(); } // of this thread of the machine

    // For the functions of emulator.h.
    void wait_for_block();
    void wait_for_warp(const char *name, Work work, void *operands);
    Copies &copies() { return has_copied = true, pending[running - threads.get()]; }
    const Launch *launch = nullptr;
    Place place;

  private:
    static __thread Block *own_block;
    static Block &make_own();
    static void body();
    void run_warp(unsigned warp);
    Thread *next();
    void pause();
    void poison();

    std::unique_ptr<Thread[]> threads{new Thread[MOST_THREADS]};
    unsigned count = 0, done = 0;
    Thread *running = nullptr;

    // Of the warp under way. Sets of lanes are of their turns.
    Thread *lanes = nullptr;
    unsigned lane_of_turn[LANES];
    unsigned turn = 0;
    uint32_t whole = 0, can_run = 0, at_work = 0; // all that there are; the last: waiting for `work`
    Work work = nullptr;
    const char *work_name = nullptr;
    void *operands[LANES]; // by lanes

    std::unique_ptr<Copies[]> pending{new Copies[MOST_THREADS]};
    bool has_copied = false;
    Context scheduler;
    char *memory;               // stacks, each above a page that nobody may touch, and shared memory between two such pages
    std::vector<char *> stacks; // not in use
    std::vector<char> signal_stack = std::vector<char>(64 << 10);
    std::minstd_rand random;
    const Kernel *declared_by = nullptr;
    std::pair<void *, size_t> declared; // static shared memory of that kernel
};

unsigned seed();

} // namespace emulator
