// EvenLight for ONNX Runtime's CPU provider, on the threads of the session; with its CUDA provider, too, it stays
// there.
#pragma once

#include "../cpu/even_light.hpp"
#include "api.hpp"

namespace meliad::onnxruntime {

class EvenLightKernel {
 public:
  explicit EvenLightKernel(const OrtKernelInfo* info);
  OrtStatusPtr ComputeV2(OrtKernelContext* context) const noexcept;

 private:
  cpu::EvenLight even_light_;
};

struct EvenLightOp : Ort::CustomOpBase<EvenLightOp, EvenLightKernel, /*WithStatus=*/true> {
  // api_version is what the running ONNX Runtime speaks, at most that of the headers.
  explicit EvenLightOp(uint32_t api_version);

  const char* GetName() const { return "EvenLight"; }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
    return as_status([&] { *kernel = new EvenLightKernel(info); });
  }
};

}  // namespace meliad::onnxruntime
