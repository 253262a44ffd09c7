// PatchEntropyScore as an ONNX Runtime custom operator for its CPU provider.
#pragma once

#include "api.hpp"

namespace meliad::onnxruntime {

class PatchEntropyKernel;

struct PatchEntropyOp : Ort::CustomOpBase<PatchEntropyOp, PatchEntropyKernel, /*WithStatus=*/true> {
  // api_version is what the running ONNX Runtime speaks, at most that of the headers.
  explicit PatchEntropyOp(uint32_t api_version);

  const char* GetName() const { return "PatchEntropyScore"; }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return 3; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  size_t GetOutputTypeCount() const { return 3; }
  ONNXTensorElementDataType GetOutputType(size_t index) const {
    return index == 2 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const noexcept;
};

}  // namespace meliad::onnxruntime
