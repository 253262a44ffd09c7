// Executes CUDA kernels on the CPU, block by block, with the meaning that threads, barriers, shared memory and warps
// have on a GPU. It shows wrong results and, compiled with sanitizers, races and accesses out of bounds; it says
// nothing about time.
//
// Threads of a block are fibers that run until they wait, in an order that is shuffled in every round from the seed in
// MELIAD_ON_CPU_SEED: work that lacks a barrier reads shared memory before it is written, which then still is NaN.
// With MELIAD_ON_CPU_THREADS defined they are threads of the operating system, for ThreadSanitizer.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>
#ifdef MELIAD_ON_CPU_THREADS
#include <condition_variable>
#include <mutex>
#include <thread>
#else
#include <ucontext.h>
#endif

#if __has_include(<cuda_runtime_api.h>)
// Beside headers that include CUDA's own, as TensorRT's do, its types are used; nothing of its library is.
#include <cuda_runtime_api.h>
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#else
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = struct OnCpuStream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaMalloc(void** data, size_t bytes) {
  *data = std::malloc(bytes);
  return *data == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline void cudaFree(void* data) { std::free(data); }
inline cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }  // launches have ended when they return
inline const char* cudaGetErrorString(cudaError_t) { return "on the CPU"; }
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace meliad::cuda {

#ifdef __aarch64__
using Half = __fp16;  // GCC knows _Float16 in C++ for aarch64 since version 13
#else
using Half = _Float16;
#endif

namespace on_cpu {

constexpr unsigned kWarp = 32;

// What one lane hands to the others of its warp, at most.
using Message = std::array<uint32_t, 8>;

struct Copy {
  void* target;
  const void* source;  // null for zeros
  size_t bytes;
};

struct Block;

struct Thread {
  Block* block = nullptr;
  unsigned index = 0;
  bool done = false;
  std::vector<Copy> uncommitted;             // asynchronous copies that no group holds yet
  std::vector<std::vector<Copy>> committed;  // groups of them that have not been waited for
#ifndef MELIAD_ON_CPU_THREADS
  ucontext_t context;
  std::unique_ptr<char[]> stack;
#endif
  unsigned lane() const { return index % kWarp; }
  unsigned warp() const { return index / kWarp; }
};

// Threads that meet: the last one to arrive opens the next generation.
struct Meeting {
  unsigned arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Meeting meeting;
  Message messages[2][kWarp];  // of even and odd generations, so that fast lanes do not overwrite what slow ones read
};

struct Block {
  dim3 index, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Meeting barrier;
  std::vector<char> votes[2];  // of even and odd generations, as above
  std::map<int, std::unique_ptr<char[]>> shared;
#ifdef MELIAD_ON_CPU_THREADS
  std::mutex mutex;
  std::condition_variable changed;
#else
  ucontext_t scheduler;
  bool progress = false;
#endif
};

inline thread_local Thread* self = nullptr;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "kernel on the CPU: %s\n", message);
  std::abort();
}

#ifdef MELIAD_ON_CPU_THREADS

class Exclusive {
 public:
  explicit Exclusive(Block& block) : block_(block), lock_(block.mutex) {}
  template <typename Condition>
  void wait_until(Condition condition) {
    block_.changed.wait(lock_, condition);
  }
  void opened() { block_.changed.notify_all(); }

 private:
  Block& block_;
  std::unique_lock<std::mutex> lock_;
};

inline void run(Block& block, const std::function<void()>& body, std::mt19937&) {
  std::vector<std::thread> threads;
  for (Thread& thread : block.threads) {
    threads.emplace_back([&] {
      self = &thread;
      body();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

#else

// Only one fiber runs at a time, so that nothing needs a lock.
class Exclusive {
 public:
  explicit Exclusive(Block& block) : block_(block) {}
  template <typename Condition>
  void wait_until(Condition condition) {
    Thread* const me = self;
    while (!condition()) swapcontext(&me->context, &block_.scheduler);
    block_.progress = true;
  }
  void opened() { block_.progress = true; }

 private:
  Block& block_;
};

inline const std::function<void()>* running_body = nullptr;

inline void fiber() {
  (*running_body)();
  self->done = true;
  self->block->progress = true;
}

inline void run(Block& block, const std::function<void()>& body, std::mt19937& random) {
  constexpr size_t kStackBytes = 256 << 10;
  static thread_local std::vector<std::unique_ptr<char[]>> stacks;  // used again by the next block
  running_body = &body;
  for (Thread& thread : block.threads) {
    if (stacks.empty()) stacks.emplace_back(new char[kStackBytes]);
    thread.stack = std::move(stacks.back());
    stacks.pop_back();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = &block.scheduler;
    makecontext(&thread.context, fiber, 0);
  }
  std::vector<Thread*> waiting;
  for (Thread& thread : block.threads) waiting.push_back(&thread);
  while (!waiting.empty()) {
    std::shuffle(waiting.begin(), waiting.end(), random);
    block.progress = false;
    for (Thread* thread : waiting) {
      self = thread;
      swapcontext(&block.scheduler, &thread->context);
    }
    if (!block.progress) fail("threads wait for each other forever: a barrier that not every thread reaches");
    waiting.erase(std::remove_if(waiting.begin(), waiting.end(), [](Thread* thread) { return thread->done; }),
                  waiting.end());
  }
  for (Thread& thread : block.threads) stacks.push_back(std::move(thread.stack));
}

#endif

inline void meet(Meeting& meeting, unsigned expected) {
  Exclusive exclusive(*self->block);
  const uint64_t generation = meeting.generation;
  if (++meeting.arrived == expected) {
    meeting.arrived = 0;
    ++meeting.generation;
    exclusive.opened();
  } else {
    exclusive.wait_until([&] { return meeting.generation != generation; });
  }
}

// Hands a message to every lane of the warp and returns those of all.
inline const Message* exchange(const Message& message) {
  Warp& warp = self->block->warps[self->warp()];
  Message* messages;
  {
    const Exclusive exclusive(*self->block);
    messages = warp.messages[warp.meeting.generation % 2];
  }
  messages[self->lane()] = message;
  meet(warp.meeting, std::min<unsigned>(kWarp, unsigned(self->block->threads.size()) - self->warp() * kWarp));
  return messages;
}

template <typename Type>
Type& shared(int line) {
  Exclusive exclusive(*self->block);
  std::unique_ptr<char[]>& memory = self->block->shared[line];
  if (!memory) {
    memory.reset(new char[sizeof(Type)]);
    std::memset(memory.get(), 0xFF, sizeof(Type));  // NaN, whatever the type
  }
  return *reinterpret_cast<Type*>(memory.get());
}

inline unsigned seed() {
  const char* text = std::getenv("MELIAD_ON_CPU_SEED");
  return text == nullptr ? 0 : unsigned(std::strtoul(text, nullptr, 10));
}

}  // namespace on_cpu

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, cudaStream_t,
                   const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || threads > 1024) {
    return cudaErrorInvalidValue;
  }
  std::mt19937 random(on_cpu::seed());
  std::vector<size_t> order(size_t(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  const std::function<void()> body = [&] { kernel(arguments...); };
  for (const size_t number : order) {
    on_cpu::Block block;
    block.index = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
                   unsigned(number / (size_t(grid.x) * grid.y))};
    block.grid = grid;
    block.threads.resize(threads);
    block.warps.resize((threads + on_cpu::kWarp - 1) / on_cpu::kWarp);
    for (std::vector<char>& votes : block.votes) votes.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
      block.threads[i].block = &block;
      block.threads[i].index = i;
    }
    on_cpu::run(block, body, random);
  }
  return cudaSuccess;
}

}  // namespace meliad::cuda

#define threadIdx (dim3(::meliad::cuda::on_cpu::self->index, 0, 0))
#define blockIdx (::meliad::cuda::on_cpu::self->block->index)
#define blockDim (dim3(unsigned(::meliad::cuda::on_cpu::self->block->threads.size())))
#define gridDim (::meliad::cuda::on_cpu::self->block->grid)

inline void __syncthreads() {
  auto& block = *meliad::cuda::on_cpu::self->block;
  meliad::cuda::on_cpu::meet(block.barrier, unsigned(block.threads.size()));
}

inline int __syncthreads_count(int predicate) {
  auto& block = *meliad::cuda::on_cpu::self->block;
  std::vector<char>* votes;
  {
    const meliad::cuda::on_cpu::Exclusive exclusive(block);
    votes = &block.votes[block.barrier.generation % 2];
  }
  (*votes)[meliad::cuda::on_cpu::self->index] = predicate != 0;
  __syncthreads();
  return int(std::count(votes->begin(), votes->end(), 1));
}

inline void __threadfence() {}  // blocks run one after the other

template <typename Type>
Type __ldcg(const Type* address) {
  return *address;
}

using std::isnan;
using std::max;
using std::min;

inline int atomicAdd(int* target, int value) { return __atomic_fetch_add(target, value, __ATOMIC_RELAXED); }
