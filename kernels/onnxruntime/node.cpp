#include "node.hpp"

#include <array>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace meliad::onnxruntime {
namespace {

using Shape = std::vector<int64_t>;

std::string to_text(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

void require(bool fits, const char* input, const Shape& shape, const std::string& expected) {
  if (fits) return;
  throw std::invalid_argument(std::string("PatchEntropyScore: ") + input + " has shape " + to_text(shape) +
                              ", expected " + expected + "; export the model again");
}

Shape shape_of(const Ort::ConstValue& tensor) { return tensor.GetTensorTypeAndShapeInfo().GetShape(); }

template <typename Value, size_t kRank>
Value* output(const Ort::KernelContext& context, Output index, const std::array<int64_t, kRank>& shape) {
  return context.GetOutput(index, shape.data(), kRank).template GetTensorMutableData<Value>();
}

// One dimension of a shape: its size or -1, and its name or "".
struct Dimension {
  int64_t size;
  const char* name;
};

void set_output_shape(OrtShapeInferContext* context, Output output, ONNXTensorElementDataType type,
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

// score [N], map [N, H, W] and nearest [N, 2, H, W] from z [N, D, H, W], as far as z is known. Not with
// Ort::ShapeInferContext: of ONNX Runtime 1.21 it marks named dimensions in a way that the runtime refuses.
void set_output_shapes(OrtShapeInferContext* context) {
  OrtTensorTypeAndShapeInfo* z = nullptr;  // stays the context's
  Ort::ThrowOnError(Ort::GetApi().ShapeInferContext_GetInputTypeShape(context, kZ, &z));
  const Ort::ConstTensorTypeAndShapeInfo z_info(z);
  const Shape sizes = z_info.GetShape();
  if (sizes.size() != 4) return;
  std::array<const char*, 4> names;
  z_info.GetSymbolicDimensions(names.data(), names.size());
  const Dimension images{sizes[0], names[0]}, height{sizes[2], names[2]}, width{sizes[3], names[3]}, classes{2, ""};
  set_output_shape(context, kScore, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {images});
  set_output_shape(context, kMap, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {images, height, width});
  set_output_shape(context, kNearest, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, {images, classes, height, width});
}

}  // namespace

PatchEntropyParameters read_parameters(const Ort::ConstKernelInfo& info) {
  PatchEntropyParameters parameters;
  parameters.n_normal = info.GetAttribute<int64_t>("n_normal");
  parameters.top_cells = info.GetAttribute<int64_t>("top_cells");
  parameters.softness = info.GetAttribute<float>("softness");
  parameters.normal_scale = info.GetAttribute<float>("normal_scale");
  parameters.anomaly_scale = info.GetAttribute<float>("anomaly_scale");
  parameters.bias = info.GetAttribute<float>("bias");
  parameters.kappa = info.GetAttribute<float>("kappa");
  parameters.offset = info.GetAttribute<float>("offset");
  return parameters;
}

Prototypes read_prototypes(const Ort::ConstValue& tensor) {
  const Shape shape = shape_of(tensor);
  require(shape.size() == 2, "prototypes", shape, "[K, D]");
  return {tensor.GetTensorData<float>(), shape[0], shape[1]};
}

PatchEntropyBatch read_batch(const Ort::KernelContext& context, const PatchEntropyParameters& parameters,
                             int64_t depth) {
  const auto z = context.GetInput(kZ), direction = context.GetInput(kDirection);
  const Shape z_shape = shape_of(z), direction_shape = shape_of(direction);
  require(z_shape.size() == 4 && z_shape[1] == depth, "z", z_shape, "[N, " + std::to_string(depth) + ", H, W]");
  require(direction_shape == Shape{depth}, "direction", direction_shape, "[" + std::to_string(depth) + "]");
  const int64_t images = z_shape[0], height = z_shape[2], width = z_shape[3];
  require(parameters.top_cells <= height * width, "z", z_shape,
          "at least top_cells = " + std::to_string(parameters.top_cells) + " cells");

  PatchEntropyBatch batch;
  batch.images = images;
  batch.depth = depth;
  batch.cells = height * width;
  batch.z = z.GetTensorData<float>();
  batch.direction = direction.GetTensorData<float>();
  batch.score = output<float>(context, kScore, std::array{images});
  batch.map = output<float>(context, kMap, std::array{images, height, width});
  batch.nearest = output<int64_t>(context, kNearest, std::array{images, int64_t{2}, height, width});
  return batch;
}

OrtStatusPtr infer_shapes(OrtShapeInferContext* context) noexcept {
  return as_status([&] { set_output_shapes(context); });
}

}  // namespace meliad::onnxruntime
