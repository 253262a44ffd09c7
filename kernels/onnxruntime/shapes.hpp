// Shapes of tensors, known and unknown, for the nodes of this library.
#pragma once

#include <array>
#include <initializer_list>
#include <string>
#include <vector>

#include "api.hpp"

namespace meliad::onnxruntime {

using Shape = std::vector<int64_t>;

inline Shape shape_of(const Ort::ConstValue& tensor) { return tensor.GetTensorTypeAndShapeInfo().GetShape(); }

// Throws std::invalid_argument, which names the operator and its input, unless the shape fits.
void require_shape(bool fits, const char* op, const char* input, const Shape& shape, const std::string& expected);

template <typename Value, size_t kRank>
Value* output(const Ort::KernelContext& context, size_t index, const std::array<int64_t, kRank>& shape) {
  return context.GetOutput(index, shape.data(), kRank).template GetTensorMutableData<Value>();
}

// One dimension of a shape: its size or -1, and its name or "".
struct Dimension {
  int64_t size;
  const char* name;
};

// Dimensions of an input, as far as they are known: none where not even their number is. Not with
// Ort::ShapeInferContext: of ONNX Runtime 1.21 it marks named dimensions in a way that the runtime refuses.
std::vector<Dimension> input_shape(const OrtShapeInferContext* context, size_t input);

void set_output_shape(OrtShapeInferContext* context, size_t output, ONNXTensorElementDataType type,
                      std::initializer_list<Dimension> shape);

}  // namespace meliad::onnxruntime
