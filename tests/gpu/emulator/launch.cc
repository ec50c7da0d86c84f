#include "launch.h"

#include "block.h"

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

namespace emulator {
namespace {

// Threads that help the caller, and end with the process.
class Helpers {
  public:
    Helpers() {
        const char *given = getenv("EMULATOR_THREADS");
        const int threads = given ? atoi(given) : (int)std::thread::hardware_concurrency();
        for (helpers = 0; helpers + 1 < threads; helpers++) std::thread([this] { help(); }).detach();
    }

    void run(size_t count, const std::function<void(size_t)> &work) {
        std::lock_guard one_at_a_time(loop);
        next = 0;
        if (count == 1 || helpers == 0) {
            for (size_t i = 0; i < count; i++) work(i);
            return;
        }
        {
            std::lock_guard lock(mutex);
            task = &work, end = count, busy = helpers, round++;
        }
        begun.notify_all();
        for (size_t i; (i = next++) < count;) work(i);
        std::unique_lock lock(mutex);
        finished.wait(lock, [&] { return busy == 0; });
    }

  private:
    void help() {
        for (unsigned seen = 0;;) {
            const std::function<void(size_t)> *work;
            size_t count;
            {
                std::unique_lock lock(mutex);
                begun.wait(lock, [&] { return round != seen; });
                seen = round, work = task, count = end;
            }
            for (size_t i; (i = next++) < count;) (*work)(i);
            std::lock_guard lock(mutex);
            if (--busy == 0) finished.notify_one();
        }
    }

    std::mutex loop, mutex;
    std::condition_variable begun, finished;
    const std::function<void(size_t)> *task = nullptr;
    std::atomic<size_t> next{0};
    size_t end = 0;
    int helpers, busy = 0;
    unsigned round = 0;
};

} // namespace

Counts counts;
Counts::~Counts() {
    if (getenv("EMULATOR_COUNTS"))
        fprintf(stderr, "%zu kernels, %zu products by cuBLAS, %zu copies, %zu allocations; %zu graphs for %zu of these\n",
                kernels.load(), products.load(), copies.load(), allocations.load(), graphs.load(), in_graphs.load());
}

void in_parallel(size_t count, const std::function<void(size_t)> &work) {
    static Helpers &helpers = *new Helpers; // their threads outlive what destructors destroy
    helpers.run(count, work);
}

// What a driver refuses is refused.
CUresult launch(const Launch &launch) {
    const dim3 &grid = launch.grid, &block = launch.block;
    const size_t blocks = (size_t)grid.x * grid.y * grid.z, threads = (size_t)block.x * block.y * block.z;
    if (blocks == 0 || grid.x > INT32_MAX || grid.y > UINT16_MAX || grid.z > UINT16_MAX) return CUDA_ERROR_INVALID_VALUE;
    if (threads == 0 || threads > MOST_THREADS || block.z > 64) return CUDA_ERROR_INVALID_VALUE;
    if (launch.shared > launch.kernel->shared_allowed) return CUDA_ERROR_INVALID_VALUE;
    constexpr size_t STRIDE = 2654435761; // a prime: every block has its turn
    in_parallel(blocks, [&](size_t turn) {
        const size_t i = seed() ? (turn * STRIDE + seed()) % blocks : turn;
        Block::own().run(launch, {(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y), (unsigned)(i / grid.x / grid.y)});
    });
    return CUDA_SUCCESS;
}

} // namespace emulator
