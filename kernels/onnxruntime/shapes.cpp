#include "shapes.hpp"

#include <stdexcept>

namespace meliad::onnxruntime {
namespace {

std::string to_text(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace

void require_shape(bool fits, const char* op, const char* input, const Shape& shape, const std::string& expected) {
  if (fits) return;
  throw std::invalid_argument(std::string(op) + ": " + input + " has shape " + to_text(shape) + ", expected " +
                              expected + "; export the model again");
}

std::vector<Dimension> input_shape(const OrtShapeInferContext* context, size_t input) {
  OrtTensorTypeAndShapeInfo* raw_info = nullptr;  // stays the context's
  Ort::ThrowOnError(Ort::GetApi().ShapeInferContext_GetInputTypeShape(context, input, &raw_info));
  const Ort::ConstTensorTypeAndShapeInfo info(raw_info);
  const Shape sizes = info.GetShape();
  std::vector<const char*> names(sizes.size());
  info.GetSymbolicDimensions(names.data(), names.size());
  std::vector<Dimension> shape;
  for (size_t i = 0; i < sizes.size(); ++i) shape.push_back({sizes[i], names[i]});
  return shape;
}

void set_output_shape(OrtShapeInferContext* context, size_t output, ONNXTensorElementDataType type,
                      std::initializer_list<Dimension> shape) {
  std::vector<int64_t> sizes;
  std::vector<const char*> names;
  for (const Dimension& dimension : shape) {
    sizes.push_back(dimension.size);
    names.push_back(dimension.name);
  }
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Ort::ThrowOnError(api.CreateTensorTypeAndShapeInfo(&info));
  const Ort::TensorTypeAndShapeInfo owner(info);
  Ort::ThrowOnError(api.SetTensorElementType(info, type));
  Ort::ThrowOnError(api.SetDimensions(info, sizes.data(), sizes.size()));
  Ort::ThrowOnError(api.SetSymbolicDimensions(info, names.data(), names.size()));
  Ort::ThrowOnError(api.ShapeInferContext_SetOutputTypeShape(context, output, info));
}

}  // namespace meliad::onnxruntime
