#include "even_light.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "shapes.hpp"

namespace meliad::onnxruntime {
namespace {

constexpr int64_t kPixelsPerTask = 16384;

// One number per colour, or one for all.
std::array<float, kColours> read_colours(const Ort::ConstKernelInfo& info, const char* name) {
  const std::vector<float> values = info.GetAttributes<float>(name);
  std::array<float, kColours> colours;
  if (values.size() == 1) {
    colours.fill(values[0]);
  } else if (values.size() == kColours) {
    std::copy(values.begin(), values.end(), colours.begin());
  } else {
    throw std::invalid_argument("EvenLight: " + std::string(name) + " has " + std::to_string(values.size()) +
                                " values; it must have 1 or 3");
  }
  return colours;
}

EvenLightParameters read_parameters(const Ort::ConstKernelInfo& info) {
  return {info.GetAttribute<float>("mean"), info.GetAttribute<float>("spread"),
          info.GetAttribute<float>("smallest_spread"), read_colours(info, "shift"), read_colours(info, "scale")};
}

// Calls work(task) for every task, on the threads of the session.
template <typename Work>
void parallel_for(const Ort::KernelContext& context, int64_t tasks, Work work) {
  const auto call = [](void* argument, size_t task) noexcept { (*static_cast<Work*>(argument))(int64_t(task)); };
  context.ParallelFor(call, size_t(tasks), size_t(tasks), &work);
}

void compute(const Ort::KernelContext& context, const cpu::EvenLight& even_light) {
  const auto frames = context.GetInput(0);
  const Shape shape = shape_of(frames);
  require_shape(shape.size() == 4 && shape[3] == kColours, "EvenLight", "frames", shape, "[N, H, W, 3]");
  const int64_t images = shape[0], pixels = shape[1] * shape[2];
  const uint8_t* const bytes = frames.GetTensorData<uint8_t>();
  float* const planes = output<float>(context, 0, std::array{images, int64_t{kColours}, shape[1], shape[2]});
  if (images * pixels == 0) return;

  thread_local std::vector<cpu::Light> lights;  // keeps its memory for the next run
  lights.resize(size_t(images));
  cpu::Light* const light = lights.data();
  parallel_for(context, images, [=, &even_light](int64_t image) {
    light[image] = even_light.measure(bytes + image * kColours * pixels, pixels);
  });
  const int64_t tasks_per_image = (pixels + kPixelsPerTask - 1) / kPixelsPerTask;
  parallel_for(context, images * tasks_per_image, [=, &even_light](int64_t task) {
    const int64_t image = task / tasks_per_image, first = task % tasks_per_image * kPixelsPerTask;
    even_light.write(bytes + image * kColours * pixels, pixels, light[image], first,
                     std::min(pixels, first + kPixelsPerTask), planes + image * kColours * pixels);
  });
}

// images [N, 3, H, W] from frames [N, H, W, 3], as far as they are known.
void set_output_shapes(OrtShapeInferContext* context) {
  const std::vector<Dimension> frames = input_shape(context, 0);
  if (frames.size() != 4) return;
  set_output_shape(context, 0, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {frames[0], {kColours, ""}, frames[1], frames[2]});
}

}  // namespace

EvenLightKernel::EvenLightKernel(const OrtKernelInfo* info)
    : even_light_(read_parameters(Ort::ConstKernelInfo(info))) {}

OrtStatusPtr EvenLightKernel::ComputeV2(OrtKernelContext* raw_context) const noexcept {
  return as_status([&] { compute(Ort::KernelContext(raw_context), even_light_); });
}

EvenLightOp::EvenLightOp(uint32_t api_version) {
  OrtCustomOp::version = api_version;
  OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
    return as_status([&] { set_output_shapes(context); });
  };
}

}  // namespace meliad::onnxruntime
