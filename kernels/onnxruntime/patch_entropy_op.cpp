#include "patch_entropy_op.hpp"

#include <array>
#include <atomic>
#include <initializer_list>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/patch_entropy.hpp"

namespace meliad::onnxruntime {
namespace {

using Shape = std::vector<int64_t>;

enum Input : size_t { kZ, kPrototypes, kDirection };
enum Output : size_t { kScore, kMap, kNearest };

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

cpu::PatchEntropyScorer make_scorer(const PatchEntropyParameters& parameters, const Ort::ConstValue& prototypes) {
  const Shape shape = shape_of(prototypes);
  require(shape.size() == 2, "prototypes", shape, "[K, D]");
  return {parameters, prototypes.GetTensorData<float>(), shape[0], shape[1]};
}

void score(const Ort::KernelContext& context, const cpu::PatchEntropyScorer& scorer, const PatchEntropyBatch& batch) {
  struct Run {
    const cpu::PatchEntropyScorer& scorer;
    const PatchEntropyBatch& batch;
    std::atomic<bool> out_of_memory{false};
  } run{scorer, batch};
  const auto score_tile = [](void* argument, size_t tile) noexcept {
    auto& run = *static_cast<Run*>(argument);
    try {
      run.scorer.score_tile(run.batch, int64_t(tile));
    } catch (const std::bad_alloc&) {  // must not unwind into a thread of the host
      run.out_of_memory = true;
    }
  };
  context.ParallelFor(score_tile, size_t(scorer.tile_count(batch)), 0, &run);
  if (run.out_of_memory) throw std::bad_alloc();
  scorer.score_images(batch);
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
void infer_shapes(OrtShapeInferContext* context) {
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

class PatchEntropyKernel {
 public:
  explicit PatchEntropyKernel(const OrtKernelInfo* raw_info) {
    const Ort::ConstKernelInfo info(raw_info);
    parameters_ = read_parameters(info);
    int is_constant = 0;
    const Ort::ConstValue prototypes = info.GetTensorConstantInput(kPrototypes, &is_constant);
    if (is_constant) packed_.emplace(make_scorer(parameters_, prototypes));
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw_context) const noexcept {
    return as_status([&] { compute(Ort::KernelContext(raw_context)); });
  }

 private:
  void compute(const Ort::KernelContext& context) const {
    if (packed_) return compute(context, *packed_);
    compute(context, make_scorer(parameters_, context.GetInput(kPrototypes)));
  }

  void compute(const Ort::KernelContext& context, const cpu::PatchEntropyScorer& scorer) const {
    const auto z = context.GetInput(kZ), direction = context.GetInput(kDirection);
    const Shape z_shape = shape_of(z), direction_shape = shape_of(direction);
    const std::string depth = std::to_string(scorer.depth());
    require(z_shape.size() == 4 && z_shape[1] == scorer.depth(), "z", z_shape, "[N, " + depth + ", H, W]");
    require(direction_shape == Shape{scorer.depth()}, "direction", direction_shape, "[" + depth + "]");
    const int64_t images = z_shape[0], height = z_shape[2], width = z_shape[3];
    require(parameters_.top_cells <= height * width, "z", z_shape,
            "at least top_cells = " + std::to_string(parameters_.top_cells) + " cells");

    PatchEntropyBatch batch;
    batch.images = images;
    batch.depth = scorer.depth();
    batch.cells = height * width;
    batch.z = z.GetTensorData<float>();
    batch.direction = direction.GetTensorData<float>();
    batch.score = output<float>(context, kScore, std::array{images});
    batch.map = output<float>(context, kMap, std::array{images, height, width});
    batch.nearest = output<int64_t>(context, kNearest, std::array{images, int64_t{2}, height, width});
    score(context, scorer, batch);
  }

  template <typename Value, size_t kRank>
  static Value* output(const Ort::KernelContext& context, Output index, const std::array<int64_t, kRank>& shape) {
    return context.GetOutput(index, shape.data(), kRank).template GetTensorMutableData<Value>();
  }

  PatchEntropyParameters parameters_;
  std::optional<cpu::PatchEntropyScorer> packed_;  // when the prototypes are constant, as in every exported model
};

PatchEntropyOp::PatchEntropyOp(uint32_t api_version) {
  OrtCustomOp::version = api_version;
  OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
    return as_status([&] { infer_shapes(context); });
  };
}

OrtStatusPtr PatchEntropyOp::CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
  return as_status([&] { *kernel = new PatchEntropyKernel(info); });
}

}  // namespace meliad::onnxruntime
