// libcuda.so.1 for tests: what PyCUDA and our engine call of it, on a machine without a GPU.
//
// Memory of the device is memory of the heap. What is enqueued on a stream is only done when somebody waits for it, and
// then in order: whoever forgets to wait, or overwrites a buffer too early, gets wrong values every time.
// Pageable memory in an asynchronous copy is an error, because such a copy would not be asynchronous.
// cuda_stand_in_calls(name) counts the calls of a function; cuda_stand_in_fail(name, code) makes its next calls fail.
#include <cuda.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Work = std::function<void()>;

struct Stream {
  std::deque<Work> queue;
  std::vector<Work>* captured = nullptr;
};

struct Event {
  Stream* stream = nullptr;
  bool pending = false;
  std::chrono::steady_clock::time_point passed;
};

using Graph = std::vector<Work>;

std::recursive_mutex mutex;
std::map<std::string, int> calls;
std::map<std::string, int> failures;
std::map<char*, size_t> pinned, device_memory;
thread_local std::vector<CUcontext> contexts;
int primary_context_uses = 0;
int primary_context;

CUcontext the_context() { return reinterpret_cast<CUcontext>(&primary_context); }
Stream* to_stream(CUstream handle) { return reinterpret_cast<Stream*>(handle); }
Event* to_event(CUevent handle) { return reinterpret_cast<Event*>(handle); }

CUresult enter(const char* name) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  ++calls[name];
  const auto failure = failures.find(name);
  return failure == failures.end() ? CUDA_SUCCESS : CUresult(failure->second);
}

// Every function that works on a context refuses to without one, as the driver does.
CUresult enter_in_context(const char* name) {
  const CUresult result = enter(name);
  if (result != CUDA_SUCCESS) return result;
  return contexts.empty() ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

bool is_inside(const std::map<char*, size_t>& blocks, const void* pointer, size_t bytes) {
  auto* const first = const_cast<char*>(static_cast<const char*>(pointer));
  auto block = blocks.upper_bound(first);
  if (block == blocks.begin()) return false;
  --block;
  return first + bytes <= block->first + block->second;
}

void enqueue(Stream* stream, Work work) {
  if (stream->captured != nullptr) {
    stream->captured->push_back(std::move(work));
  } else {
    stream->queue.push_back(std::move(work));
  }
}

// Callbacks may take Python's lock, so ours is not held while one runs.
void finish(Stream* stream) {
  while (true) {
    Work work;
    {
      const std::lock_guard<std::recursive_mutex> lock(mutex);
      if (stream->queue.empty()) return;
      work = std::move(stream->queue.front());
      stream->queue.pop_front();
    }
    work();
  }
}

template <typename Blocks>
char* allocate(Blocks& blocks, size_t bytes) {
  auto* const memory = static_cast<char*>(std::malloc(bytes));
  std::memset(memory, 0xCD, bytes);
  blocks[memory] = bytes;
  return memory;
}

template <typename Blocks>
CUresult release(Blocks& blocks, char* memory) {
  if (blocks.erase(memory) == 0) return CUDA_ERROR_INVALID_VALUE;
  std::memset(memory, 0xDD, 1);
  std::free(memory);
  return CUDA_SUCCESS;
}

CUresult copy_async(const void* host, const void* on_device, size_t bytes, CUstream stream, Work copy) {
  if (!is_inside(pinned, host, bytes) || !is_inside(device_memory, on_device, bytes)) return CUDA_ERROR_INVALID_VALUE;
  enqueue(to_stream(stream), std::move(copy));
  return CUDA_SUCCESS;
}

}  // namespace

#define ENTER(name) \
  if (const CUresult entered = enter(name)) return entered
#define ENTER_IN_CONTEXT(name)                                         \
  if (const CUresult entered = enter_in_context(name)) return entered; \
  const std::lock_guard<std::recursive_mutex> lock(mutex)

EXPORT int cuda_stand_in_calls(const char* name) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  return calls[name];
}

EXPORT void cuda_stand_in_fail(const char* name, int code) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  if (code == 0) {
    failures.erase(name);
  } else {
    failures[name] = code;
  }
}

EXPORT int cuda_stand_in_blocks() { return int(pinned.size() + device_memory.size()); }

EXPORT int cuda_stand_in_contexts() { return int(contexts.size()); }

EXPORT CUresult cuInit(unsigned) {
  ENTER("cuInit");
  return std::getenv("CUDA_STAND_IN_NO_DEVICE") ? CUDA_ERROR_NO_DEVICE : CUDA_SUCCESS;
}

EXPORT CUresult cuDriverGetVersion(int* version) {
  *version = 12060;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  const char* const other = std::getenv("CUDA_STAND_IN_NAME");
  std::strncpy(name, other != nullptr ? other : "Stand-in Orin", size_t(size));
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute, CUdevice) {
  *value = 1;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice) {
  *major = 8;
  *minor = 7;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  ENTER("cuDevicePrimaryCtxRetain");
  ++primary_context_uses;
  *context = the_context();
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) {
  return primary_context_uses-- > 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
  if (context != the_context()) return CUDA_ERROR_INVALID_CONTEXT;
  contexts.push_back(context);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = contexts.back();
  contexts.pop_back();
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
  ENTER_IN_CONTEXT("cuCtxGetDevice");
  *device = 0;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* memory, size_t bytes) {
  ENTER_IN_CONTEXT("cuMemAlloc");
  *memory = reinterpret_cast<CUdeviceptr>(allocate(device_memory, bytes));
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemFree_v2(CUdeviceptr memory) {
  ENTER_IN_CONTEXT("cuMemFree");
  return release(device_memory, reinterpret_cast<char*>(memory));
}

EXPORT CUresult cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
  ENTER_IN_CONTEXT("cuMemHostAlloc");
  *memory = allocate(pinned, bytes);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuMemFreeHost(void* memory) {
  ENTER_IN_CONTEXT("cuMemFreeHost");
  return release(pinned, static_cast<char*>(memory));
}

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void* source, size_t bytes, CUstream stream) {
  ENTER_IN_CONTEXT("cuMemcpyHtoDAsync");
  auto* const to = reinterpret_cast<void*>(target);
  return copy_async(source, to, bytes, stream, [=] { std::memcpy(to, source, bytes); });
}

EXPORT CUresult cuMemcpyDtoHAsync_v2(void* target, CUdeviceptr source, size_t bytes, CUstream stream) {
  ENTER_IN_CONTEXT("cuMemcpyDtoHAsync");
  const auto* const from = reinterpret_cast<const void*>(source);
  return copy_async(target, from, bytes, stream, [=] { std::memcpy(target, from, bytes); });
}

EXPORT CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
  ENTER_IN_CONTEXT("cuLaunchHostFunc");
  enqueue(to_stream(stream), [=] { function(data); });
  return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamCreate(CUstream* stream, unsigned) {
  ENTER_IN_CONTEXT("cuStreamCreate");
  *stream = reinterpret_cast<CUstream>(new Stream);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamDestroy_v2(CUstream stream) {
  delete to_stream(stream);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamSynchronize(CUstream stream) {
  if (const CUresult entered = enter_in_context("cuStreamSynchronize")) return entered;
  if (to_stream(stream)->captured != nullptr) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  finish(to_stream(stream));
  return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode) {
  ENTER_IN_CONTEXT("cuStreamBeginCapture");
  to_stream(stream)->captured = new Graph;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  ENTER_IN_CONTEXT("cuStreamEndCapture");
  *graph = reinterpret_cast<CUgraph>(std::exchange(to_stream(stream)->captured, nullptr));
  return CUDA_SUCCESS;
}

EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
  ENTER_IN_CONTEXT("cuGraphInstantiate");
  *executable = reinterpret_cast<CUgraphExec>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return CUDA_SUCCESS;
}

EXPORT CUresult cuGraphDestroy(CUgraph graph) {
  ENTER_IN_CONTEXT("cuGraphDestroy");
  delete reinterpret_cast<Graph*>(graph);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuGraphExecDestroy(CUgraphExec executable) {
  ENTER_IN_CONTEXT("cuGraphExecDestroy");
  delete reinterpret_cast<Graph*>(executable);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
  ENTER_IN_CONTEXT("cuGraphLaunch");
  for (const Work& work : *reinterpret_cast<Graph*>(executable)) enqueue(to_stream(stream), work);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuEventCreate(CUevent* event, unsigned) {
  ENTER_IN_CONTEXT("cuEventCreate");
  *event = reinterpret_cast<CUevent>(new Event);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuEventDestroy_v2(CUevent event) {
  delete to_event(event);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuEventRecord(CUevent event, CUstream stream) {
  ENTER_IN_CONTEXT("cuEventRecord");
  Event* const recorded = to_event(event);
  recorded->stream = to_stream(stream);
  recorded->pending = true;
  enqueue(recorded->stream, [=] {
    recorded->pending = false;
    recorded->passed = std::chrono::steady_clock::now();
  });
  return CUDA_SUCCESS;
}

#undef cuEventElapsedTime
EXPORT CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
  ENTER_IN_CONTEXT("cuEventElapsedTime");
  *milliseconds = std::chrono::duration<float, std::milli>(to_event(end)->passed - to_event(start)->passed).count();
  return CUDA_SUCCESS;
}

EXPORT CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start, CUevent end) {
  return cuEventElapsedTime(milliseconds, start, end);
}

// Only what was enqueued before the event is done.
EXPORT CUresult cuEventSynchronize(CUevent event) {
  if (const CUresult entered = enter_in_context("cuEventSynchronize")) return entered;
  Event* const awaited = to_event(event);
  while (awaited->pending) {
    Work work;
    {
      const std::lock_guard<std::recursive_mutex> lock(mutex);
      work = std::move(awaited->stream->queue.front());
      awaited->stream->queue.pop_front();
    }
    work();
  }
  return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char** text) {
  switch (error) {
    case CUDA_ERROR_NO_DEVICE:
      *text = "no CUDA-capable device is detected";
      break;
    case CUDA_ERROR_OUT_OF_MEMORY:
      *text = "out of memory";
      break;
    case CUDA_ERROR_INVALID_CONTEXT:
      *text = "invalid device context";
      break;
    default:
      *text = "stand-in error";
  }
  return CUDA_SUCCESS;
}
