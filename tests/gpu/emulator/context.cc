#include "context.h"

#include "graph.h"
#include "launch.h"
#include "memory.h"

#include <cstring>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) CUresult
#define OK return CUDA_SUCCESS

using namespace emulator;

namespace {

struct Context {
    int device;
};
Context primary[DEVICES] = {{0}, {1}};
thread_local std::vector<Context *> contexts;

} // namespace

int emulator::current_device() { return contexts.empty() ? -1 : contexts.back()->device; }

API cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return ordinal >= 0 && ordinal < DEVICES ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
API cuDeviceGetCount(int *count) { *count = DEVICES; OK; }
API cuDeviceGetName(char *name, int room, CUdevice) { strncpy(name, "emulator", room); OK; }
API cuDeviceTotalMem_v2(size_t *bytes, CUdevice) { *bytes = DEVICE_BYTES; OK; }
API cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = LANES; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = MOST_THREADS; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = MOST_SHARED; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 1; break;
    default: fail("device attribute %d is not known", attribute);
    }
    OK;
}

API cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = reinterpret_cast<CUcontext>(&primary[device]); OK; }
API cuDevicePrimaryCtxRelease_v2(CUdevice) { OK; }
API cuCtxCreate_v4(CUcontext *context, CUctxCreateParams *, unsigned, CUdevice device) {
    contexts.push_back(new Context{device});
    *context = reinterpret_cast<CUcontext>(contexts.back());
    OK;
}
API cuCtxDestroy_v2(CUcontext context) { delete reinterpret_cast<Context *>(context); OK; }
API cuCtxGetCurrent(CUcontext *context) { *context = contexts.empty() ? nullptr : reinterpret_cast<CUcontext>(contexts.back()); OK; }
API cuCtxSetCurrent(CUcontext context) {
    if (!contexts.empty()) contexts.pop_back();
    if (context) contexts.push_back(reinterpret_cast<Context *>(context));
    OK;
}
API cuCtxSynchronize() { return refuse_while_capturing(true); }
