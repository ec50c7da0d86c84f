// The functions of the driver that candle, cudarc and the tests call, but for those of devices, streams and graphs. Events are nothing:
// all is done at once, or as a graph is launched.
#include "context.h"
#include "graph.h"
#include "launch.h"
#include "memory.h"

#include <dlfcn.h>

#include <cstring>
#include <filesystem>
#include <map>
#include <mutex>
#include <string>

#define API extern "C" __attribute__((visibility("default"))) CUresult
#define OK return CUDA_SUCCESS

using namespace emulator;

namespace {

// A kernel on a device.
struct Function {
    Kernel *kernel;
    int device;
};

struct Module {
    std::string ptx;
    int device;
    std::map<std::string, Function> functions; // that were asked for: candle asks at each launch
};

// The program's PTX must have the kernel, and so must the sources that were compiled for the CPU.
Kernel *find(const Module &module, const std::string &name) {
    if (module.ptx.find(".entry " + name + "(") == std::string::npos) return nullptr;
    Kernel *found = nullptr;
    for (Kernel *kernel = Kernel::first; kernel; kernel = kernel->next) {
        if (kernel->name != name) continue;
        if (found) fail("two of the files compiled for the CPU have a kernel %s", name.c_str());
        found = kernel;
    }
    if (!found) fprintf(stderr, "CUDA emulator: no kernel %s among those compiled for the CPU\n", name.c_str());
    return found;
}

// The kernels lie beside this library, each file's in a library of its own. Loaded late, their thread-local memory, which is
// what `__shared__` declares, costs only the threads that run blocks.
void load_kernels() {
    Dl_info self;
    dladdr(reinterpret_cast<void *>(&load_kernels), &self);
    for (const auto &entry : std::filesystem::directory_iterator(std::filesystem::path(self.dli_fname).parent_path() / "kernels"))
        if (!dlopen(entry.path().c_str(), RTLD_NOW | RTLD_LOCAL)) fail("%s", dlerror());
}

std::mutex modules;

// Between main memory and a device, or on one: nothing goes from one to another, which the interface forbids.
CUresult copy(void *to, const void *from, size_t bytes, bool to_device, bool from_device) {
    if (bytes == 0) OK;
    counts.copies++;
    const auto at = [](const void *p) { return reinterpret_cast<CUdeviceptr>(p); };
    if ((to_device && !is_device(at(to), bytes)) || (from_device && !is_device(at(from), bytes))) return CUDA_ERROR_INVALID_VALUE;
    if (to_device && from_device && device_of(at(to)) != device_of(at(from))) fail("a copy from one device to another");
    memmove(to, from, bytes);
    OK;
}
void *pointer(CUdeviceptr address) { return reinterpret_cast<void *>(address); }

} // namespace

API cuInit(unsigned) {
    static bool once = (load_kernels(), report_faults(), true);
    (void)once;
    OK;
}
API cuDriverGetVersion(int *version) { *version = 13000; OK; }
API cuGetExportTable(const void **, const CUuuid *) { return CUDA_ERROR_NOT_FOUND; } // NVRTC asks, and does without
API cuGetErrorName(CUresult error, const char **text) { *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "a CUDA error"; OK; }
API cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : error == CUDA_ERROR_NOT_FOUND ? "named symbol not found" : "invalid argument";
    OK;
}

API cuEventCreate(CUevent *event, unsigned) { *event = reinterpret_cast<CUevent>(new char); OK; }
API cuEventDestroy_v2(CUevent event) { delete reinterpret_cast<char *>(event); OK; }
API cuEventRecord(CUevent, CUstream stream) { return refuse_in_capture(stream); }
API cuEventSynchronize(CUevent) { OK; }

API cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    const CUresult refused = refuse_while_capturing();
    if (current_device() < 0) return CUDA_ERROR_INVALID_CONTEXT;
    return refused ? refused : allocate(address, bytes, current_device());
}
API cuMemFree_v2(CUdeviceptr address) {
    const CUresult refused = refuse_while_capturing();
    return refused ? refused : release(address);
}
// Unlike the other, this one gives nothing gladly: candle asks for it for the shapes of scalars.
API cuMemAllocAsync(CUdeviceptr *address, size_t bytes, CUstream stream) {
    *address = 0;
    if (current_device() < 0) return CUDA_ERROR_INVALID_CONTEXT;
    return bytes > 0 ? allocate_in_order(address, bytes, stream) : CUDA_SUCCESS;
}
API cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
    // Where destructors call, nobody would see the error for long.
    if (current_device() < 0) fail("memory was freed by a thread without a current context");
    return address ? release_in_order(address, stream) : CUDA_SUCCESS;
}
API cuMemHostAlloc(void **address, size_t bytes, unsigned) { return allocate_host(address, bytes); }
API cuMemFreeHost(void *address) { return release_host(address); }
API cuMemGetInfo_v2(size_t *free, size_t *total) {
    if (current_device() < 0) return CUDA_ERROR_INVALID_CONTEXT;
    *free = DEVICE_BYTES - used_bytes(current_device()), *total = DEVICE_BYTES;
    OK;
}
API cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice) { *pool = nullptr; OK; }
API cuMemPoolSetAttribute(CUmemoryPool, CUmemPool_attribute, void *) { OK; }
API cuMemPoolTrimTo(CUmemoryPool, size_t) { OK; }
API cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    const bool device = is_device(address, 1);
    if (!device && !is_pinned(address)) return CUDA_ERROR_INVALID_VALUE;
    unsigned found = 0;
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: found = device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST; break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: found = device ? device_of(address) : 0; break;
    default: fail("pointer attribute %d is not known", attribute);
    }
    memcpy(value, &found, sizeof found);
    OK;
}

// Main memory may be gone when a graph is launched: a driver would capture these copies, and nobody should.
API cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) {
    const CUresult refused = refuse_while_capturing();
    return refused ? refused : copy(pointer(to), from, bytes, true, false);
}
API cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) {
    const CUresult refused = refuse_while_capturing();
    return refused ? refused : copy(to, pointer(from), bytes, false, true);
}
API cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    const CUresult refused = refuse_in_capture(stream);
    return refused ? refused : copy(pointer(to), from, bytes, true, false);
}
API cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    const CUresult refused = refuse_in_capture(stream);
    return refused ? refused : copy(to, pointer(from), bytes, false, true);
}
API cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return ask(stream, [=] { return copy(pointer(to), pointer(from), bytes, true, true); });
}
API cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t bytes, CUstream stream) {
    return ask(stream, [=] { return copy(pointer(to), pointer(from), bytes, true, true); });
}
API cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream) {
    if (bytes > 0 && !is_device(to, bytes)) return CUDA_ERROR_INVALID_VALUE;
    return ask(stream, [=] { return counts.copies++, memset(pointer(to), value, bytes), CUDA_SUCCESS; });
}

API cuModuleLoadData(CUmodule *module, const void *image) {
    *module = reinterpret_cast<CUmodule>(new Module{static_cast<const char *>(image), current_device(), {}});
    return refuse_while_capturing();
}
API cuModuleLoad(CUmodule *, const char *) { return CUDA_ERROR_FILE_NOT_FOUND; }
API cuModuleUnload(CUmodule module) { delete reinterpret_cast<Module *>(module); OK; }
API cuModuleGetFunction(CUfunction *function, CUmodule handle, const char *name) {
    std::lock_guard lock(modules);
    Module &module = *reinterpret_cast<Module *>(handle);
    Function &found = module.functions[name];
    if (!found.kernel) found = {find(module, name), module.device};
    *function = reinterpret_cast<CUfunction>(&found);
    return found.kernel ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
API cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) fail("function attribute %d is not known", attribute);
    if (value < 0 || (size_t)value > MOST_SHARED) return CUDA_ERROR_INVALID_VALUE;
    reinterpret_cast<Function *>(function)->kernel->shared_allowed = value;
    OK;
}
API cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y, unsigned z,
                   unsigned shared, CUstream stream, void **arguments, void **) {
    const auto [kernel, device] = *reinterpret_cast<Function *>(handle);
    if (device != current_device() || device != stream_device(stream)) return CUDA_ERROR_INVALID_HANDLE;
    for (const void *argument : kernel->pointers(arguments))
        if (const auto at = reinterpret_cast<CUdeviceptr>(argument); is_device(at, 1) && device_of(at) != device)
            fail("kernel %s on device %d was given memory of device %d", kernel->name, device, device_of(at));
    return ask(stream, [=, kernel = kernel, kept = kernel->keep(arguments)] {
        counts.kernels++;
        return launch({kernel, {grid_x, grid_y, grid_z}, {x, y, z}, shared, kept.get()});
    });
}
