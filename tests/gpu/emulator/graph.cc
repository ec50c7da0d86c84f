#include "graph.h"

#include "context.h"
#include "launch.h"
#include "memory.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) CUresult
#define OK return CUDA_SUCCESS

namespace emulator {
namespace {

// Its memory is the device's once it is launched, as much as is in use at a time, and until the memory of graphs is trimmed.
struct Graph {
    struct Piece {
        size_t bytes;
        bool freed;
    };
    int device;
    std::vector<Task> tasks = {};
    std::map<CUdeviceptr, Piece> memory = {}; // that it allocates
    size_t in_use = 0, most_in_use = 0;
    bool has_memory = false;

    explicit Graph(int device) : device(device) {
        std::lock_guard lock(mutex);
        all.insert(this);
    }
    ~Graph();
    bool take_memory();

    static std::mutex mutex;
    static std::set<Graph *> all;
    static size_t idle[DEVICES]; // of graphs that are gone
};
std::mutex Graph::mutex;
std::set<Graph *> Graph::all;
size_t Graph::idle[DEVICES];

Graph::~Graph() {
    for (const auto &[address, piece] : memory) reserve(device, piece.bytes), show(address), release(address);
    std::lock_guard lock(mutex);
    all.erase(this);
    if (has_memory) idle[device] += most_in_use;
}

bool Graph::take_memory() {
    std::lock_guard lock(mutex);
    const size_t found = std::min(idle[device], most_in_use);
    if (!has_memory && !reserve(device, most_in_use - found)) return false;
    if (!has_memory) idle[device] -= found;
    return has_memory = true;
}

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
    Graph &graph = *stream->captured;
    graph.memory[*address] = {bytes, false};
    graph.most_in_use = std::max(graph.most_in_use, graph.in_use += bytes);
    hide(*address), reserve(graph.device, -(ptrdiff_t)bytes);
    return ask(handle, [at = *address] { return counts.allocations++, show(at), CUDA_SUCCESS; });
}

CUresult release_in_order(CUdeviceptr address, CUstream handle) {
    Stream *stream = captured(handle);
    if (!stream) {
        if (is_device(address, 1) && device_of(address) != stream_device(handle)) fail("memory was freed on another device's stream");
        return release(address);
    }
    auto found = stream->captured->memory.find(address);
    if (found == stream->captured->memory.end() || found->second.freed) return refuse_in_capture(handle), CUDA_ERROR_INVALID_VALUE;
    found->second.freed = true, stream->captured->in_use -= found->second.bytes;
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
    *stream = {stream->device, new Graph(stream->device), false, std::this_thread::get_id()};
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
    auto &graph = *reinterpret_cast<Graph *>(launchable);
    if (const CUresult refused = refuse_in_capture(stream)) return refused;
    for (const auto &[address, piece] : graph.memory)
        if (!piece.freed) fail("a graph is launched that does not free what it allocates: a second launch would be refused");
    if (!graph.take_memory()) return CUDA_ERROR_OUT_OF_MEMORY;
    counts.graphs++, counts.in_graphs += graph.tasks.size() - graph.memory.size(); // what is freed is not counted
    for (const Task &task : graph.tasks)
        if (const CUresult failed = task()) return failed;
    OK;
}
API cuDeviceGraphMemTrim(CUdevice device) {
    std::lock_guard lock(Graph::mutex);
    for (Graph *graph : Graph::all)
        if (graph->device == device && std::exchange(graph->has_memory, false)) Graph::idle[device] += graph->most_in_use;
    reserve(device, -(ptrdiff_t)std::exchange(Graph::idle[device], 0));
    OK;
}
