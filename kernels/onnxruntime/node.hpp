// The node as ONNX Runtime sees it, whichever execution provider computes it: its schema, and its tensors as a batch.
#pragma once

#include "../patch_entropy.hpp"
#include "api.hpp"

namespace meliad::onnxruntime {

enum Input : size_t { kZ, kPrototypes, kDirection };
enum Output : size_t { kScore, kMap, kNearest };

PatchEntropyParameters read_parameters(const Ort::ConstKernelInfo& info);

// Prototypes, [count, depth].
struct Prototypes {
  const float* values;
  int64_t count, depth;
};

// Throws std::invalid_argument when the shape is another one.
Prototypes read_prototypes(const Ort::ConstValue& tensor);
inline Prototypes read_prototypes(const Ort::KernelContext& context) {
  return read_prototypes(context.GetInput(kPrototypes));
}

// Inputs and outputs of one run, in the memory of the provider. Throws std::invalid_argument when the shapes do not fit
// the depth of the prototypes or the parameters.
PatchEntropyBatch read_batch(const Ort::KernelContext& context, const PatchEntropyParameters& parameters,
                             int64_t depth);

// Computes output shapes from those of the inputs, as far as they are known.
OrtStatusPtr infer_shapes(OrtShapeInferContext* context) noexcept;

// The operator for one provider; Kernel is constructed from const OrtKernelInfo* and has ComputeV2.
template <typename Kernel>
struct PatchEntropyOp : Ort::CustomOpBase<PatchEntropyOp<Kernel>, Kernel, /*WithStatus=*/true> {
  // api_version is what the running ONNX Runtime speaks, at most that of the headers.
  explicit PatchEntropyOp(uint32_t api_version) {
    OrtCustomOp::version = api_version;
    OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
      return infer_shapes(context);
    };
  }

  const char* GetName() const { return "PatchEntropyScore"; }
  const char* GetExecutionProviderType() const { return Kernel::kProvider; }
  size_t GetInputTypeCount() const { return 3; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  size_t GetOutputTypeCount() const { return 3; }
  ONNXTensorElementDataType GetOutputType(size_t index) const {
    return index == kNearest ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
    return as_status([&] { *kernel = new Kernel(info); });
  }
};

}  // namespace meliad::onnxruntime
