// A block of threads on one of the machine's threads.
#pragma once
#include "emulator.h"
#include "fiber.h"

#include <memory>
#include <random>

namespace emulator {

struct Thread {
    uint3 index;
    enum { Fresh, Running, AtBlock, AtWarp, Done } state;
    Context context; // while it waits
    char *stack;
    const char *waits_in; // of AtWarp, as are the next two
    Work work;
    void *operands;
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
    Copies &copies() { return has_copied = true, pending[running]; }
    const Launch *launch = nullptr;
    Place place;

  private:
    static __thread Block *own_block;
    static Block &make_own();
    static void body();
    void run_warp();
    void pause();
    Thread *next();
    void enter(Thread *thread, Context &from);
    void poison();
    unsigned lane_of_turn(unsigned turn) const { return (lane_step * turn + lane_start) % LANES; }

    Thread &current() { return threads[running]; }

    std::unique_ptr<Thread[]> threads{new Thread[MOST_THREADS]};
    std::unique_ptr<Copies[]> pending{new Copies[MOST_THREADS]};
    bool has_copied = false;
    unsigned count = 0, running = 0, warp = 0, turn = 0, waiting = 0, done = 0, lane_start = 0, lane_step = 1;
    Context scheduler;
    char *memory;              // stacks, each above a page that nobody may touch, and shared memory between two such pages
    std::vector<char *> stacks; // not in use
    std::vector<char> signal_stack = std::vector<char>(64 << 10);
    std::minstd_rand random;
    const Kernel *declared_by = nullptr;
    std::pair<void *, size_t> declared; // static shared memory of that kernel
};

unsigned seed();

} // namespace emulator
