// Device memory: each allocation ends at a page that nobody may touch.
#pragma once
#include <cuda.h>

#include <cstddef>

namespace emulator {

constexpr size_t DEVICE_BYTES = 4ull << 30; // of each device

// All bits set.
CUresult allocate(CUdeviceptr *address, size_t bytes, int device);
CUresult release(CUdeviceptr address);
// Whether kernels can reach an allocation; when it is shown again, all bits are set.
void hide(CUdeviceptr address);
void show(CUdeviceptr address);
size_t used_bytes(int device);
// Takes from, or gives back to, what is left of a device without an address; false where there is less.
bool reserve(int device, ptrdiff_t bytes);
// Whether these bytes are of one allocation.
bool is_device(CUdeviceptr address, size_t bytes);
// Whose memory an address within an allocation is.
int device_of(CUdeviceptr address);
// Pinned memory of the host.
CUresult allocate_host(void **address, size_t bytes);
CUresult release_host(void *address);
bool is_pinned(CUdeviceptr address);
// Reports a touch of memory that is not there, with the kernel that did it.
void report_faults();

} // namespace emulator
