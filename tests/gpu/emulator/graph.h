// Streams, and graphs of the work that is captured from them.
#pragma once
#include <cuda.h>

#include <functional>

namespace emulator {

using Task = std::function<CUresult()>;

// That of the current context for the streams that have no handle of their own.
int stream_device(CUstream stream);

// Does the task now or, where the stream is being captured, when the graph is launched.
CUresult ask(CUstream stream, const Task &task);
// For what no graph holds: an error where the stream is being captured, and the capture is lost.
CUresult refuse_in_capture(CUstream stream);
// The same for what may not be asked by a thread that captures any stream, and, where `of_all`, not while any thread does.
CUresult refuse_while_capturing(bool of_all = false);

// Memory in the stream's order. What a graph allocates is its own: poisoned at each launch, and out of reach once it is freed.
CUresult allocate_in_order(CUdeviceptr *address, size_t bytes, CUstream stream);
CUresult release_in_order(CUdeviceptr address, CUstream stream);

} // namespace emulator
