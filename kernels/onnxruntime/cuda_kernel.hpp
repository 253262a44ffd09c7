// PatchEntropyScore for ONNX Runtime's CUDA provider, on the stream of the session.
#pragma once

#include "node.hpp"

namespace meliad::onnxruntime {

class CudaKernel {
 public:
  static constexpr const char* kProvider = "CUDAExecutionProvider";

  explicit CudaKernel(const OrtKernelInfo* info);
  OrtStatusPtr ComputeV2(OrtKernelContext* context) const noexcept;

 private:
  PatchEntropyParameters parameters_;
  Ort::MemoryInfo memory_;  // of the device
};

}  // namespace meliad::onnxruntime
