#include "cuda_kernel.hpp"

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

int current_device() {
  int device = 0;
  require_success(cudaGetDevice(&device));
  return device;
}

// Memory of the provider's arena for one run. It may be handed on when the run is enqueued but not finished: whatever
// takes it next waits in the same stream.
class Workspace {
 public:
  Workspace(const Ort::KernelContext& context, const OrtMemoryInfo& memory, size_t bytes)
      : allocator_(context.GetAllocator(memory)), data_(allocator_->Alloc(allocator_, bytes)) {}
  ~Workspace() {
    allocator_->Free(allocator_, data_);
    Ort::GetApi().ReleaseAllocator(allocator_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return data_; }

 private:
  OrtAllocator* allocator_;
  void* data_;
};

}  // namespace

CudaKernel::CudaKernel(const OrtKernelInfo* info)
    : parameters_(read_parameters(Ort::ConstKernelInfo(info))),
      memory_("Cuda", OrtDeviceAllocator, current_device(), OrtMemTypeDefault) {
  check_parameters(parameters_);
}

OrtStatusPtr CudaKernel::ComputeV2(OrtKernelContext* raw_context) const noexcept {
  return as_status([&] {
    const Ort::KernelContext context(raw_context);
    const Prototypes prototypes = read_prototypes(context);
    check_classes(parameters_, prototypes.count);
    const PatchEntropyBatch batch = read_batch(context, parameters_, prototypes.depth);
    if (batch.images == 0) return;
    const Workspace workspace(context, *memory_, cuda::workspace_bytes(batch.images, batch.cells));
    require_success(cuda::score_patches(parameters_, prototypes.values, prototypes.count, batch, workspace.data(),
                                        static_cast<cudaStream_t>(context.GetGPUComputeStream())));
  });
}

}  // namespace meliad::onnxruntime
