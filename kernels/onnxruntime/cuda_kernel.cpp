#include "cuda_kernel.hpp"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../cuda/patch_entropy.hpp"
#include "../parameters.hpp"

namespace meliad::onnxruntime {
namespace {

void require_success(cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("PatchEntropyScore on CUDA: ") + cudaGetErrorString(error));
}

}  // namespace

// Device memory that is handed out and taken back in the order of a stream, so that concurrent runs of a session, each
// on a stream of its own, never share any. It keeps what it has once taken from the system.
class MemoryPool {
 public:
  MemoryPool() {
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    require_success(cudaGetDevice(&properties.location.id));
    require_success(cudaMemPoolCreate(&pool_, &properties));
    uint64_t keep = UINT64_MAX;
    require_success(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &keep));
  }
  ~MemoryPool() { cudaMemPoolDestroy(pool_); }
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  cudaMemPool_t get() const { return pool_; }

 private:
  cudaMemPool_t pool_;
};

namespace {

// Memory of a pool for one run.
class Workspace {
 public:
  Workspace(const MemoryPool& pool, size_t bytes, cudaStream_t stream) : stream_(stream) {
    require_success(cudaMallocFromPoolAsync(&data_, bytes, pool.get(), stream));
  }
  ~Workspace() { cudaFreeAsync(data_, stream_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  cudaStream_t stream_;
};

}  // namespace

CudaKernel::CudaKernel(const OrtKernelInfo* info)
    : parameters_(read_parameters(Ort::ConstKernelInfo(info))), pool_(std::make_unique<MemoryPool>()) {
  check_parameters(parameters_);
}

CudaKernel::~CudaKernel() = default;

OrtStatusPtr CudaKernel::ComputeV2(OrtKernelContext* raw_context) const noexcept {
  return as_status([&] {
    const Ort::KernelContext context(raw_context);
    const Prototypes prototypes = read_prototypes(context);
    check_classes(parameters_, prototypes.count);
    const PatchEntropyBatch batch = read_batch(context, parameters_, prototypes.depth);
    if (batch.images == 0) return;
    const auto stream = static_cast<cudaStream_t>(context.GetGPUComputeStream());
    const Workspace workspace(*pool_, cuda::workspace_bytes(batch.images, batch.cells), stream);
    require_success(
        cuda::score_patches(parameters_, prototypes.values, prototypes.count, batch, workspace.data(), stream));
  });
}

}  // namespace meliad::onnxruntime
