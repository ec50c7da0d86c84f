#include "block.h"

#include <link.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" void *__tls_get_addr(unsigned long *index); // makes the copy where there is none yet

namespace emulator {

__thread const Place *place;
__thread const uint3 *thread_index;
Kernel *Kernel::first = nullptr;

namespace {
// This thread's copy of what is thread-local in the library that holds the kernel, and its size.
std::pair<void *, size_t> declared_in_library(const Kernel &kernel) {
    struct Search {
        uintptr_t inside;
        unsigned long index[2]; // as __tls_get_addr takes it: module, offset
        size_t bytes;
    } search{reinterpret_cast<uintptr_t>(kernel.call), {}, 0};
    dl_iterate_phdr([](dl_phdr_info *info, size_t, void *data) {
        auto &search = *static_cast<Search *>(data);
        size_t bytes = 0;
        bool holds = false;
        for (const auto *part = info->dlpi_phdr; part < info->dlpi_phdr + info->dlpi_phnum; part++) {
            if (part->p_type == PT_LOAD) holds |= search.inside - info->dlpi_addr - part->p_vaddr < part->p_memsz;
            if (part->p_type == PT_TLS) bytes = part->p_memsz;
        }
        if (holds) search.index[0] = info->dlpi_tls_modid, search.bytes = bytes;
        return (int)holds;
    }, &search);
    return {search.bytes > 0 ? __tls_get_addr(search.index) : nullptr, search.bytes};
}

constexpr size_t PAGE = 4096, STACK = 128 << 10, SHARED = (MOST_SHARED + PAGE - 1) / PAGE * PAGE + 2 * PAGE;
} // namespace

unsigned seed() {
    static const unsigned seed = [] {
        const char *given = getenv("EMULATOR_SEED");
        return given ? (unsigned)strtoul(given, nullptr, 10) : 1u;
    }();
    return seed;
}

__thread Block *Block::own_block;
Block &Block::make_own() {
    static thread_local Block block;
    own_block = &block;
    return block;
}

Block::Block() {
    const size_t bytes = MOST_THREADS * STACK + SHARED;
    memory = static_cast<char *>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED) fail("no memory for the stacks of a block");
    for (unsigned i = MOST_THREADS; i-- > 0;) {
        mprotect(memory + i * STACK, PAGE, PROT_NONE);
        stacks.push_back(memory + i * STACK);
    }
    mprotect(memory + MOST_THREADS * STACK, PAGE, PROT_NONE);
    mprotect(memory + bytes - PAGE, PAGE, PROT_NONE);
    stack_t for_signals = {}; // a fault may be that of a full stack; what Rust gives its threads is too small to print on
    for_signals.ss_sp = signal_stack.data(), for_signals.ss_size = signal_stack.size();
    sigaltstack(&for_signals, nullptr);
}

Block::~Block() {
    stack_t none = {};
    none.ss_flags = SS_DISABLE;
    sigaltstack(&none, nullptr);
    munmap(memory, MOST_THREADS * STACK + SHARED);
}

// All bits set, NaN in every type, where a kernel has not written yet: in its dynamic shared memory, which ends at a page that
// nobody may touch, and in what `__shared__` declares, which is all that is thread-local in the kernel's library.
void Block::poison() {
    place.shared = memory + MOST_THREADS * STACK + SHARED - PAGE - (launch->shared + 15) / 16 * 16;
    memset(place.shared, 0xff, launch->shared);
    const bool other = declared_by != launch->kernel;
    if (other) declared_by = launch->kernel, declared = declared_in_library(*launch->kernel);
    // Half a megabyte, of a file with many kernels, would take longer than they do.
    if (declared.second > 0 && (other || declared.second <= 16 << 10)) memset(declared.first, 0xff, declared.second);
}

void Block::run(const Launch &next_launch, uint3 index) {
    launch = &next_launch;
    const dim3 size = launch->block;
    place = {index, size, launch->grid, nullptr};
    emulator::place = &place;
    poison();
    count = size.x * size.y * size.z;
    random.seed(seed() + 1000003 * (index.x + launch->grid.x * (index.y + launch->grid.y * index.z)));
    uint3 next_index{0, 0, 0};
    for (unsigned i = 0; i < count; i++) {
        threads[i].index = next_index, threads[i].begun = threads[i].done = false;
        if (++next_index.x == size.x) next_index.x = 0, next_index.y++;
        if (next_index.y == size.y) next_index.y = 0, next_index.z++;
    }
    if (has_copied) // by an earlier block
        for (unsigned i = 0; i < MOST_THREADS; i++) pending[i].copies.clear(), pending[i].groups.clear();
    has_copied = false;
    unsigned order[MOST_THREADS / LANES];
    const unsigned warps = (count + LANES - 1) / LANES;
    for (unsigned i = 0; i < warps; i++) order[i] = i;
    for (unsigned i = 0; i < LANES; i++) lane_of_turn[i] = i;
    for (done = 0;;) {
        if (seed()) {
            std::shuffle(order, order + warps, random);
            const unsigned first = random(), step = 2 * random() + 1;
            for (unsigned i = 0; i < LANES; i++) lane_of_turn[i] = (first + step * i) % LANES;
        }
        for (unsigned i = 0; i < warps; i++) run_warp(order[i]);
        if (done == count) break;
        if (done > 0) fail("%u of %u threads wait in __syncthreads for those that have returned", count - done, count);
    }
    launch = nullptr;
}

// Until each lane waits for the block or has returned.
void Block::run_warp(unsigned warp) {
    lanes = &threads[warp * LANES], turn = 0, whole = 0, can_run = 0;
    for (unsigned i = 0; i < LANES; i++)
        if (warp * LANES + lane_of_turn[i] < count) {
            whole |= 1u << i;
            if (!lanes[lane_of_turn[i]].done) can_run |= 1u << i;
        }
    if (!can_run) return;
    memset(operands, 0, sizeof operands);
    running = next(), thread_index = &running->index;
    switch_to(scheduler, running->context);
    thread_index = nullptr;
    if (at_work) fail("lanes of the warp of thread %u wait in %s for others that do not come", warp * LANES, work_name);
}

// The next lane of the warp that can go on; it has a stack.
[[gnu::always_inline]] inline Thread *Block::next() {
    if (!can_run) return nullptr;
    const uint32_t later = can_run >> turn << turn;
    turn = __builtin_ctz(later ? later : can_run);
    Thread *thread = &lanes[lane_of_turn[turn]];
    if (!thread->begun) {
        thread->begun = true, thread->stack = stacks.back(), stacks.pop_back();
        // Stacks that begin in the same set of the cache would push each other out.
        const size_t colour = (thread->stack - memory) / STACK % 61 * 448;
        start(thread->context, thread->stack + PAGE, thread->stack + STACK - colour, body);
    }
    return thread;
}

// Leaves the running thread for the next, or for the scheduler.
[[gnu::always_inline]] inline void Block::pause() {
    can_run &= ~(1u << turn);
    Thread *left = running, *to = next();
    if (to) running = to, thread_index = &to->index;
    switch_to(left->context, to ? to->context : scheduler);
}

// Runs a thread and, on the same stack, those that have not begun: as long as none waits, there is no change of stacks.
void Block::body() {
    Block &block = own();
    for (;;) {
        block.launch->kernel->call(block.launch->arguments);
        Thread *thread = block.running;
        thread->done = true, block.done++;
        block.stacks.push_back(thread->stack); // the next to begin takes it
        block.can_run &= ~(1u << block.turn);
        Thread *to = block.next();
        if (to) block.running = to, thread_index = &to->index;
        if (to && to->stack == thread->stack) continue;
        switch_to(thread->context, to ? to->context : block.scheduler);
    }
}

[[gnu::always_inline]] inline void Block::wait_for_block() { pause(); }

[[gnu::always_inline]] inline void Block::wait_for_warp(const char *name, Work next_work, void *own) {
    if (at_work && work != next_work) fail("it is in %s, and another lane of its warp in %s", name, work_name);
    work = next_work, work_name = name;
    operands[running - lanes] = own, at_work |= 1u << turn;
    if (at_work != whole) return pause();
    work(operands);
    at_work = 0, can_run = whole;
}

void wait_for_block() { Block::own().wait_for_block(); }
void with_warp(const char *name, Work work, void *operands) { Block::own().wait_for_warp(name, work, operands); }

void check_shared(const void *address, const char *what) {
    const Block &block = Block::own();
    const auto at = reinterpret_cast<uintptr_t>(address), from = reinterpret_cast<uintptr_t>(block.place.shared);
    if (at % 16) fail("%s at an address that is no multiple of 16 bytes", what);
    if (at < from || at + 16 > from + block.launch->shared)
        fail("%s at byte %td of %zu bytes of shared memory", what, (ptrdiff_t)(at - from), block.launch->shared);
}

void copy_later(void *to, const void *from, bool valid) {
    check_shared(to, "cp.async");
    if (reinterpret_cast<uintptr_t>(from) % 16) fail("cp.async from %p, which is no multiple of 16 bytes", from);
    memset(to, 0xff, 16);
    Block::own().copies().copies.push_back({to, from, valid});
}

void end_group() {
    Copies &own = Block::own().copies();
    own.groups.push_back(own.copies.size());
}

void wait_for_groups(size_t all_but) {
    auto &[copies, groups] = Block::own().copies();
    if (groups.size() <= all_but) return;
    const auto last = groups.end() - all_but;
    const size_t arrived = last[-1];
    for (size_t i = 0; i < arrived; i++) {
        if (copies[i].valid) memcpy(copies[i].to, copies[i].from, 16);
        else memset(copies[i].to, 0, 16);
    }
    copies.erase(copies.begin(), copies.begin() + arrived);
    groups.erase(groups.begin(), last);
    for (size_t &group : groups) group -= arrived;
}

void fail(const char *format, ...) {
    fputs("CUDA emulator: ", stderr);
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    if (const Launch *launch = Block::own().launch) {
        fprintf(stderr, "; kernel %s, block (%u, %u, %u)", launch->kernel->name, place->block.x, place->block.y, place->block.z);
        if (thread_index) fprintf(stderr, ", thread (%u, %u, %u)", thread_index->x, thread_index->y, thread_index->z);
    }
    fputc('\n', stderr);
    abort();
}

} // namespace emulator
