// The parameters of PatchEntropyScore as TensorRT hands them around: by name.
#pragma once

#include <array>

#include "../patch_entropy.hpp"
#include "api.hpp"

namespace meliad::tensorrt {

class PatchEntropyFields {
 public:
  // Names and types only, as a creator announces them.
  PatchEntropyFields();
  // Points into the parameters, which must outlive this.
  explicit PatchEntropyFields(const PatchEntropyParameters& parameters);
  PatchEntropyFields(const PatchEntropyFields&) = delete;
  PatchEntropyFields& operator=(const PatchEntropyFields&) = delete;

  const nvinfer1::PluginFieldCollection* collection() const { return &collection_; }

 private:
  std::array<nvinfer1::PluginField, 8> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

// Throws std::invalid_argument for a field that is missing, twice there, of another type, or impossible. Fields of
// other names are left alone: they are TensorRT's own.
PatchEntropyParameters read_parameters(const nvinfer1::PluginFieldCollection* fields);

}  // namespace meliad::tensorrt
