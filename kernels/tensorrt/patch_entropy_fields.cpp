#include "patch_entropy_fields.hpp"

#include <cstring>
#include <string>

#include "../parameters.hpp"

namespace meliad::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

template <typename Parameters, typename Visit>
void for_each_parameter(Parameters& parameters, Visit visit) {
  visit("n_normal", parameters.n_normal);
  visit("top_cells", parameters.top_cells);
  visit("softness", parameters.softness);
  visit("normal_scale", parameters.normal_scale);
  visit("anomaly_scale", parameters.anomaly_scale);
  visit("bias", parameters.bias);
  visit("kappa", parameters.kappa);
  visit("offset", parameters.offset);
}

constexpr PatchEntropyParameters kNoValues{};

PluginFieldType type_of(int64_t) { return PluginFieldType::kINT64; }
PluginFieldType type_of(float) { return PluginFieldType::kFLOAT32; }

const PluginField& only_field(const PluginFieldCollection& fields, const char* name) {
  const PluginField* found = nullptr;
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    const PluginField& field = fields.fields[i];
    if (field.name == nullptr || std::strcmp(field.name, name) != 0) continue;
    if (found != nullptr) refuse("field " + std::string(name) + " is there twice");
    found = &field;
  }
  if (found == nullptr) refuse("field " + std::string(name) + " is missing; export the model again");
  if (found->data == nullptr || found->length != 1) refuse("field " + std::string(name) + " must hold one value");
  return *found;
}

template <typename Value>
Value value_of(const PluginField& field) {
  Value value;
  std::memcpy(&value, field.data, sizeof value);  // nothing promises that it is aligned
  return value;
}

void read(const PluginFieldCollection& fields, const char* name, int64_t& value) {
  const PluginField& field = only_field(fields, name);
  if (field.type == PluginFieldType::kINT64) {
    value = value_of<int64_t>(field);
  } else if (field.type == PluginFieldType::kINT32) {  // what the ONNX parser makes of an integer
    value = value_of<int32_t>(field);
  } else {
    refuse("field " + std::string(name) + " must be an integer");
  }
}

void read(const PluginFieldCollection& fields, const char* name, float& value) {
  const PluginField& field = only_field(fields, name);
  if (field.type != PluginFieldType::kFLOAT32) refuse("field " + std::string(name) + " must be a 32-bit float");
  value = value_of<float>(field);
}

}  // namespace

PatchEntropyFields::PatchEntropyFields(const PatchEntropyParameters& parameters)
    : collection_{int32_t(fields_.size()), fields_.data()} {
  auto field = fields_.begin();
  for_each_parameter(parameters,
                     [&](const char* name, const auto& value) { *field++ = {name, &value, type_of(value), 1}; });
}

PatchEntropyFields::PatchEntropyFields() : PatchEntropyFields(kNoValues) {
  for (PluginField& field : fields_) field.data = nullptr;
}

PatchEntropyParameters read_parameters(const PluginFieldCollection* fields) {
  if (fields == nullptr) refuse("no fields were given");
  PatchEntropyParameters parameters;
  for_each_parameter(parameters, [&](const char* name, auto& value) { read(*fields, name, value); });
  check_parameters(parameters);
  return parameters;
}

}  // namespace meliad::tensorrt
