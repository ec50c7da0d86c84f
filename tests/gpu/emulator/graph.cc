#include "graph.h"

#include "context.h"
#include "launch.h"
#include "memory.h"

#include <atomic>
#include <map>
#include <thread>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) CUresult
#define OK return CUDA_SUCCESS

namespace emulator {
namespace {

struct Graph {
    std::vector<Task> tasks;
    std::map<CUdeviceptr, bool> memory; // that it allocates, and whether it frees it
    ~Graph() {
        for (const auto &[address, freed] : memory) show(address), release(address);
    }
};

struct Stream {
    int device;
    Graph *captured = nullptr;
    bool lost = false;
    std::thread::id by;
};

std::atomic<int> captures;
thread_local int own_captures;

bool has_handle(CUstream stream) { return stream && stream != CU_STREAM_LEGACY && stream != CU_STREAM_PER_THREAD; }

// The streams that have no handle of their own are never captured.
Stream *captured(CUstream handle) {
    auto *stream = reinterpret_cast<Stream *>(handle);
    if (!has_handle(handle) || !stream->captured) return nullptr;
    // A driver takes it into the graph, which nobody would want.
    if (stream->by != std::this_thread::get_id()) fail("a stream was asked for work while another thread captured it");
    return stream;
}

} // namespace

int stream_device(CUstream handle) { return has_handle(handle) ? reinterpret_cast<Stream *>(handle)->device : current_device(); }

CUresult ask(CUstream handle, const Task &task) {
    Stream *stream = captured(handle);
    if (!stream) return task();
    if (stream->lost) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    stream->captured->tasks.push_back(task);
    OK;
}

CUresult refuse_in_capture(CUstream handle) {
    Stream *stream = captured(handle);
    if (!stream) OK;
    stream->lost = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}
CUresult refuse_while_capturing(bool of_all) { return (of_all ? captures.load() : own_captures) ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS; }

CUresult allocate_in_order(CUdeviceptr *address, size_t bytes, CUstream handle) {
    Stream *stream = captured(handle);
    const CUresult allocated = allocate(address, bytes, stream_device(handle));
    if (allocated != CUDA_SUCCESS || !stream) return counts.allocations++, allocated;
    stream->captured->memory[*address] = false;
    hide(*address);
    return ask(handle, [at = *address] { return counts.allocations++, show(at), CUDA_SUCCESS; });
}

CUresult release_in_order(CUdeviceptr address, CUstream handle) {
    Stream *stream = captured(handle);
    if (!stream) {
        if (is_device(address, 1) && device_of(address) != stream_device(handle)) fail("memory was freed on another device's stream");
        return release(address);
    }
    auto found = stream->captured->memory.find(address);
    if (found == stream->captured->memory.end() || found->second) return refuse_in_capture(handle), CUDA_ERROR_INVALID_VALUE;
    found->second = true;
    return ask(handle, [address] { return hide(address), CUDA_SUCCESS; });
}

} // namespace emulator

using namespace emulator;

API cuStreamCreate(CUstream *stream, unsigned) { *stream = reinterpret_cast<CUstream>(new Stream{current_device()}); OK; }
API cuStreamDestroy_v2(CUstream stream) { delete reinterpret_cast<Stream *>(stream); OK; }
API cuStreamSynchronize(CUstream stream) { return refuse_in_capture(stream); }
API cuStreamQuery(CUstream stream) { return refuse_in_capture(stream); }
API cuStreamWaitEvent(CUstream stream, CUevent, unsigned) { return refuse_in_capture(stream); }

API cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus *status) {
    Stream *stream = captured(handle);
    *status = !stream ? CU_STREAM_CAPTURE_STATUS_NONE : stream->lost ? CU_STREAM_CAPTURE_STATUS_INVALIDATED : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    OK;
}
API cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
    auto *stream = reinterpret_cast<Stream *>(handle);
    if (mode != CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) fail("capture mode %d is not emulated", mode);
    if (captured(handle)) return CUDA_ERROR_ILLEGAL_STATE;
    *stream = {stream->device, new Graph, false, std::this_thread::get_id()};
    captures++, own_captures++;
    OK;
}
API cuStreamEndCapture(CUstream handle, CUgraph *graph) {
    Stream *stream = captured(handle);
    *graph = nullptr;
    if (!stream) return CUDA_ERROR_ILLEGAL_STATE;
    captures--, own_captures--;
    Graph *captured = std::exchange(stream->captured, nullptr);
    if (stream->lost) return delete captured, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    *graph = reinterpret_cast<CUgraph>(captured);
    OK;
}

// What is launched is the graph itself, which has to outlive it.
API cuGraphInstantiateWithFlags(CUgraphExec *launchable, CUgraph graph, unsigned long long flags) {
    if (flags != 0) fail("flags %llu of a graph are not emulated", flags);
    *launchable = reinterpret_cast<CUgraphExec>(graph);
    OK;
}
API cuGraphExecDestroy(CUgraphExec) { OK; }
API cuGraphDestroy(CUgraph graph) { delete reinterpret_cast<Graph *>(graph); OK; }
API cuGraphLaunch(CUgraphExec launchable, CUstream stream) {
    const auto &graph = *reinterpret_cast<Graph *>(launchable);
    if (const CUresult refused = refuse_in_capture(stream)) return refused;
    for (const auto &[address, freed] : graph.memory)
        if (!freed) fail("a graph is launched that does not free what it allocates: a second launch would be refused");
    counts.graphs++, counts.in_graphs += graph.tasks.size() - graph.memory.size(); // what is freed is not counted
    for (const Task &task : graph.tasks)
        if (const CUresult failed = task()) return failed;
    OK;
}
API cuDeviceGraphMemTrim(CUdevice) { OK; }
