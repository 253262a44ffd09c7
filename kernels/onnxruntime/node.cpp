#include "node.hpp"

#include <array>
#include <string>
#include <vector>

#include "shapes.hpp"

namespace meliad::onnxruntime {
namespace {

// Of an input of this operator.
void require(bool fits, const char* input, const Shape& shape, const std::string& expected) {
  require_shape(fits, "PatchEntropyScore", input, shape, expected);
}

// score [N], map [N, H, W] and nearest [N, 2, H, W] from z [N, D, H, W], as far as z is known.
void set_output_shapes(OrtShapeInferContext* context) {
  const std::vector<Dimension> z = input_shape(context, kZ);
  if (z.size() != 4) return;
  const Dimension images = z[0], height = z[2], width = z[3], classes{2, ""};
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
