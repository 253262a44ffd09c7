// PatchEntropyScore for ONNX Runtime's CUDA provider, on the stream of the session.
#pragma once

#include <memory>

#include "node.hpp"

namespace meliad::onnxruntime {

class MemoryPool;

class CudaKernel {
 public:
  static constexpr const char* kProvider = "CUDAExecutionProvider";

  explicit CudaKernel(const OrtKernelInfo* info);
  ~CudaKernel();
  OrtStatusPtr ComputeV2(OrtKernelContext* context) const noexcept;

 private:
  PatchEntropyParameters parameters_;
  std::unique_ptr<MemoryPool> pool_;
};

}  // namespace meliad::onnxruntime
