#include "memory.h"

#include "block.h"
#include "context.h"

#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace emulator {
namespace {

constexpr size_t PAGE = 4096, GRAIN = 16; // what an access of 16 bytes asks of an address, and all that kernels may rely on
constexpr size_t MOST_FILLED = 256 << 20; // memory that nobody touches costs nothing

std::recursive_mutex mutex; // a fault may come while it is held
std::map<CUdeviceptr, size_t> allocations, pinned;
std::map<CUdeviceptr, int> devices; // of allocations
size_t used[DEVICES];

size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }
size_t mapped(size_t bytes) { return rounded(bytes, PAGE) + 2 * PAGE; }
char *mapping(CUdeviceptr address, size_t bytes) {
    return reinterpret_cast<char *>(address) - (rounded(bytes, PAGE) - rounded(bytes, GRAIN)) - PAGE;
}

// The allocation that holds the address, or the nearest below.
std::map<CUdeviceptr, size_t>::iterator below(std::map<CUdeviceptr, size_t> &all, CUdeviceptr address) {
    auto found = all.upper_bound(address);
    return found == all.begin() ? all.end() : --found;
}
bool holds(std::map<CUdeviceptr, size_t> &all, CUdeviceptr address, size_t bytes) {
    std::lock_guard lock(mutex);
    auto found = below(all, address);
    return found != all.end() && address + bytes <= found->first + found->second;
}

void on_fault(int signal, siginfo_t *info, void *) {
    struct sigaction usual = {};
    usual.sa_handler = SIG_DFL;
    sigaction(signal, &usual, nullptr), sigaction(SIGABRT, &usual, nullptr);
    if (!Block::own().launch) return; // not by a kernel: the instruction is tried again, and ends the process
    const auto address = reinterpret_cast<CUdeviceptr>(info->si_addr);
    auto found = below(allocations, address);
    if (found == allocations.end()) fail("memory at %p was touched, which is none of the device's", info->si_addr);
    if (address < found->first + found->second) fail("memory at %p was touched before a graph allocates it or after it frees it", info->si_addr);
    fail("memory at %p was touched, %zd bytes behind the end of an allocation of %zu bytes, and in none", info->si_addr,
         (ssize_t)(address - found->first - found->second), found->second);
}

void check_margins(CUdeviceptr address, size_t bytes) {
    char *memory = mapping(address, bytes), *data = reinterpret_cast<char *>(address);
    auto untouched = [](const char *from, const char *to) { return std::all_of(from, to, [](char c) { return c == (char)0xff; }); };
    if (bytes <= MOST_FILLED && !(untouched(memory + PAGE, data) && untouched(data + bytes, data + rounded(bytes, GRAIN))))
        fail("a kernel has written beside an allocation of %zu bytes", bytes);
}

void protect(CUdeviceptr address, size_t bytes, int access) {
    if (mprotect(mapping(address, bytes) + PAGE, rounded(bytes, PAGE), access)) fail("no memory left on this machine");
}

} // namespace

CUresult allocate(CUdeviceptr *address, size_t bytes, int device) {
    std::lock_guard lock(mutex);
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    if (bytes > DEVICE_BYTES - used[device]) return CUDA_ERROR_OUT_OF_MEMORY;
    void *memory = mmap(nullptr, mapped(bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    char *first = static_cast<char *>(memory) + PAGE;
    if (mprotect(first, rounded(bytes, PAGE), PROT_READ | PROT_WRITE)) fail("no memory left on this machine");
    memset(first, 0xff, std::min(rounded(bytes, PAGE), MOST_FILLED));
    *address = reinterpret_cast<CUdeviceptr>(first) + rounded(bytes, PAGE) - rounded(bytes, GRAIN);
    allocations[*address] = bytes, devices[*address] = device, used[device] += bytes;
    return CUDA_SUCCESS;
}

CUresult release(CUdeviceptr address) {
    std::lock_guard lock(mutex);
    auto found = allocations.find(address);
    if (found == allocations.end()) return CUDA_ERROR_INVALID_VALUE;
    const size_t bytes = found->second;
    check_margins(address, bytes);
    munmap(mapping(address, bytes), mapped(bytes));
    used[devices.at(address)] -= bytes;
    allocations.erase(found), devices.erase(address);
    return CUDA_SUCCESS;
}

void hide(CUdeviceptr address) {
    std::lock_guard lock(mutex);
    const size_t bytes = allocations.at(address);
    check_margins(address, bytes);
    protect(address, bytes, PROT_NONE);
}
void show(CUdeviceptr address) {
    std::lock_guard lock(mutex);
    const size_t bytes = allocations.at(address);
    protect(address, bytes, PROT_READ | PROT_WRITE);
    memset(mapping(address, bytes) + PAGE, 0xff, std::min(rounded(bytes, PAGE), MOST_FILLED));
}

size_t used_bytes(int device) {
    std::lock_guard lock(mutex);
    return used[device];
}
bool reserve(int device, ptrdiff_t bytes) {
    std::lock_guard lock(mutex);
    if (bytes > (ptrdiff_t)(DEVICE_BYTES - used[device])) return false;
    used[device] += bytes;
    return true;
}
bool is_device(CUdeviceptr address, size_t bytes) { return holds(allocations, address, bytes); }
int device_of(CUdeviceptr address) {
    std::lock_guard lock(mutex);
    return devices.at(below(allocations, address)->first);
}

CUresult allocate_host(void **address, size_t bytes) {
    std::lock_guard lock(mutex);
    *address = malloc(bytes);
    if (!*address) return CUDA_ERROR_OUT_OF_MEMORY;
    pinned[reinterpret_cast<CUdeviceptr>(*address)] = bytes;
    return CUDA_SUCCESS;
}
CUresult release_host(void *address) {
    std::lock_guard lock(mutex);
    if (!pinned.erase(reinterpret_cast<CUdeviceptr>(address))) return CUDA_ERROR_INVALID_VALUE;
    free(address);
    return CUDA_SUCCESS;
}
bool is_pinned(CUdeviceptr address) { return holds(pinned, address, 1); }

void report_faults() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int signal : {SIGSEGV, SIGBUS}) sigaction(signal, &action, nullptr);
}

} // namespace emulator
