// Blocks of a grid, and pieces of other work, on the machine's cores.
#pragma once
#include "emulator.h"

#include <atomic>
#include <functional>

namespace emulator {

// What the program asked for, printed at its end where EMULATOR_COUNTS is set.
struct Counts {
    std::atomic<size_t> kernels, products, copies, allocations, graphs, in_graphs; // the last: of the others
    ~Counts();
};
extern Counts counts;

// Calls `work` with 0 to count - 1, from several threads if EMULATOR_THREADS is not 1; one such loop at a time.
void in_parallel(size_t count, const std::function<void(size_t)> &work);
CUresult launch(const Launch &launch);

} // namespace emulator
