// PatchEntropyScore for ONNX Runtime's CPU provider, on the threads of the session.
#pragma once

#include <optional>

#include "../cpu/patch_entropy.hpp"
#include "node.hpp"

namespace meliad::onnxruntime {

class CpuKernel {
 public:
  static constexpr const char* kProvider = "CPUExecutionProvider";

  explicit CpuKernel(const OrtKernelInfo* info);
  OrtStatusPtr ComputeV2(OrtKernelContext* context) const noexcept;

 private:
  PatchEntropyParameters parameters_;
  std::optional<cpu::PatchEntropyScorer> packed_;  // when the prototypes are constant, as in every exported model
};

}  // namespace meliad::onnxruntime
