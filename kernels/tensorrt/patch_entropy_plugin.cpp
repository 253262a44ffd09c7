#include "patch_entropy_plugin.hpp"

#include <string>

#include "../cuda/patch_entropy.hpp"
#include "../parameters.hpp"

namespace meliad::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

enum Input : int32_t { kZ, kPrototypes, kDirection, kInputs };
enum Output : int32_t { kScore, kMap, kNearest, kOutputs };

constexpr int32_t kFailure = -1;
constexpr int64_t kUnknown = -1;  // a dimension that is only known at runtime

std::string to_text(const Dims& shape) {
  std::string text = "[";
  for (int32_t i = 0; i < shape.nbDims; ++i) text += (i ? ", " : "") + std::to_string(shape.d[i]);
  return text + "]";
}

[[noreturn]] void refuse_shape(const char* input, const Dims& shape, const std::string& expected) {
  refuse(std::string(input) + " has shape " + to_text(shape) + ", expected " + expected + "; export the model again");
}

bool agree(int64_t dimension, int64_t expected) {
  return dimension == expected || dimension == kUnknown || expected == kUnknown;
}

// Throws std::invalid_argument for shapes that cannot fit each other and the parameters, whatever is still unknown.
void check_shapes(const PatchEntropyParameters& parameters, const Dims& z, const Dims& prototypes,
                  const Dims& direction) {
  if (prototypes.nbDims != 2) refuse_shape("prototypes", prototypes, "[K, D]");
  if (prototypes.d[0] != kUnknown) check_classes(parameters, prototypes.d[0]);
  const int64_t depth = prototypes.d[1];
  const auto depth_text = [&] { return depth == kUnknown ? "D" : std::to_string(depth); };
  if (z.nbDims != 4 || !agree(z.d[1], depth)) refuse_shape("z", z, "[N, " + depth_text() + ", H, W]");
  if (direction.nbDims != 1 || !agree(direction.d[0], depth)) {
    refuse_shape("direction", direction, "[" + depth_text() + "]");
  }
  if (z.d[2] != kUnknown && z.d[3] != kUnknown && z.d[2] * z.d[3] < parameters.top_cells) {
    refuse_shape("z", z, "at least top_cells = " + std::to_string(parameters.top_cells) + " cells");
  }
}

void check_shapes(const PatchEntropyParameters& parameters, const PluginTensorDesc* inputs) {
  check_shapes(parameters, inputs[kZ].dims, inputs[kPrototypes].dims, inputs[kDirection].dims);
}

Dims known_part(const DimsExprs& shape) {
  Dims known{};
  known.nbDims = shape.nbDims;
  for (int32_t i = 0; i < shape.nbDims; ++i) {
    known.d[i] = shape.d[i]->isConstant() ? shape.d[i]->getConstantValue() : kUnknown;
  }
  return known;
}

template <typename Element>
cudaError_t score(const PatchEntropyParameters& parameters, const Dims& z, int64_t prototype_count,
                  const void* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) {
  PatchEntropyBatchOf<Element> batch;
  batch.images = z.d[0];
  batch.depth = z.d[1];
  batch.cells = z.d[2] * z.d[3];
  batch.z = static_cast<const Element*>(inputs[kZ]);
  batch.direction = static_cast<const float*>(inputs[kDirection]);
  batch.score = static_cast<float*>(outputs[kScore]);
  batch.map = static_cast<float*>(outputs[kMap]);
  batch.nearest = static_cast<int64_t*>(outputs[kNearest]);
  return cuda::score_patches(parameters, static_cast<const Element*>(inputs[kPrototypes]), prototype_count, batch,
                             workspace, stream);
}

}  // namespace

PatchEntropyPlugin::PatchEntropyPlugin(const PatchEntropyParameters& parameters)
    : parameters_(parameters), fields_(parameters_) {}

nvinfer1::IPluginCapability* PatchEntropyPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* PatchEntropyPlugin::clone() noexcept {
  return logged<PatchEntropyPlugin*>(nullptr, [&] { return new PatchEntropyPlugin(parameters_); });
}

int32_t PatchEntropyPlugin::getNbOutputs() const noexcept { return kOutputs; }

int32_t PatchEntropyPlugin::getOutputDataTypes(DataType* outputs, int32_t output_count, const DataType*,
                                               int32_t input_count) const noexcept {
  if (input_count != kInputs || output_count != kOutputs) return kFailure;
  outputs[kScore] = outputs[kMap] = DataType::kFLOAT;
  outputs[kNearest] = DataType::kINT64;
  return 0;
}

// score [N], map [N, H, W] and nearest [N, 2, H, W] from z [N, D, H, W]
int32_t PatchEntropyPlugin::getOutputShapes(const DimsExprs* inputs, int32_t input_count, const DimsExprs*, int32_t,
                                            DimsExprs* outputs, int32_t output_count,
                                            nvinfer1::IExprBuilder& builder) noexcept {
  return logged(kFailure, [&] {
    if (input_count != kInputs || output_count != kOutputs) {
      refuse("it has three inputs and three outputs; export the model again");
    }
    check_shapes(parameters_, known_part(inputs[kZ]), known_part(inputs[kPrototypes]), known_part(inputs[kDirection]));
    const auto* const* z = inputs[kZ].d;
    outputs[kScore] = {1, {z[0]}};
    outputs[kMap] = {3, {z[0], z[2], z[3]}};
    outputs[kNearest] = {4, {z[0], builder.constant(2), z[2], z[3]}};
    return 0;
  });
}

bool PatchEntropyPlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t,
                                                   int32_t) noexcept {
  const PluginTensorDesc& tensor = tensors[position].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  switch (position) {
    case kZ:
      return tensor.type == DataType::kFLOAT || tensor.type == DataType::kHALF;
    case kPrototypes:
      return tensor.type == tensors[kZ].desc.type;
    case kInputs + kNearest:
      return tensor.type == DataType::kINT64;
    default:
      return tensor.type == DataType::kFLOAT;
  }
}

size_t PatchEntropyPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t,
                                            const DynamicPluginTensorDesc*, int32_t) const noexcept {
  const Dims& z = inputs[kZ].max;
  return cuda::workspace_bytes(z.d[0], z.d[2] * z.d[3]);
}

int32_t PatchEntropyPlugin::onShapeChange(const PluginTensorDesc* inputs, int32_t, const PluginTensorDesc*,
                                          int32_t) noexcept {
  return logged(kFailure, [&] {
    check_shapes(parameters_, inputs);
    return 0;
  });
}

int32_t PatchEntropyPlugin::enqueue(const PluginTensorDesc* input_descriptions, const PluginTensorDesc*,
                                    const void* const* inputs, void* const* outputs, void* workspace,
                                    cudaStream_t stream) noexcept {
  return logged(kFailure, [&] {
    check_shapes(parameters_, input_descriptions);
    const Dims& z = input_descriptions[kZ].dims;
    if (z.d[0] == 0) return 0;  // CUDA has no empty grids
    const auto run = input_descriptions[kZ].type == DataType::kHALF ? score<cuda::Half> : score<float>;
    const cudaError_t error =
        run(parameters_, z, input_descriptions[kPrototypes].dims.d[0], inputs, outputs, workspace, stream);
    if (error != cudaSuccess) {
      log_error(
          ("PatchEntropyScore: CUDA error " + std::to_string(int(error)) + " for z of shape " + to_text(z)).c_str());
    }
    return int32_t(error);
  });
}

nvinfer1::IPluginV3* PatchEntropyPluginCreator::createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                                             nvinfer1::TensorRTPhase) noexcept {
  return logged<PatchEntropyPlugin*>(nullptr, [&] { return new PatchEntropyPlugin(read_parameters(fields)); });
}

}  // namespace meliad::tensorrt
