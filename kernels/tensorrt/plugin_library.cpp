// The two symbols of libmeliad_trt.so: TensorRT calls them when the library is loaded into its plugin registry.
#include "api.hpp"
#include "patch_entropy_plugin.hpp"

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
  meliad::tensorrt::set_logger_finder(finder);
}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) noexcept {
  static meliad::tensorrt::PatchEntropyPluginCreator patch_entropy;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&patch_entropy};
  count = 1;
  return creators;
}
