// Plays TensorRT's part for the plugin, so that a test can see every step without TensorRT and without a GPU.
//
//   tensorrt_host LIBRARY describe FIELD...                                    what the plugin says of itself
//   tensorrt_host LIBRARY infer    Z PROTOTYPES DIRECTION FIELD...             shapes of the outputs
//   tensorrt_host LIBRARY score    float|half Z PROTOTYPES DIRECTION FIELD...  a run; values on stdin and stdout
//
// A field is name=type:value, a shape 2x33x5x7, with letters for sizes that are only known at runtime. Messages of the
// plugin go to stderr. Exit: 0, 3 when the plugin was not created, 4 when shapes were refused, 5 when enqueue failed.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

enum Exit { kNotCreated = 3, kShapesRefused = 4, kEnqueueFailed = 5 };

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "host: %s\n", message.c_str());
  std::exit(2);
}

void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

// Loggers and finders in the layouts of TensorRT 10 and 11, whatever the headers have.
struct NoBase {};
struct Versioned : IVersionedInterface {
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"", 1, 0}; }
};

template <typename Base>
struct Logging {
  struct Logger : Base {
    virtual void log(ILogger::Severity severity, const char* message) noexcept {
      std::fprintf(stderr, "TensorRT %s: %s\n", severity == ILogger::Severity::kERROR ? "error" : "?", message);
    }
  } logger;
  struct Finder : Base {
    explicit Finder(Logger* logger) : logger(logger) {}
    virtual Logger* findLogger() { return logger; }
    Logger* logger;
  } finder{&logger};
};

ILoggerFinder* logger_finder(bool tensorrt_11) {
  static Logging<NoBase> ten;
  static Logging<Versioned> eleven;
  return tensorrt_11 ? reinterpret_cast<ILoggerFinder*>(&eleven.finder) : reinterpret_cast<ILoggerFinder*>(&ten.finder);
}

// A dimension as the plugin sees it while shapes are inferred: a number, or the name of one.
class Expression final : public IDimensionExpr {
 public:
  explicit Expression(std::string text) {
    implementation_.text = std::move(text);
    mImpl = &implementation_;
  }
  ~Expression() noexcept override {}
  const std::string& text() const { return implementation_.text; }

 private:
  struct Implementation : apiv::VDimensionExpr {
    std::string text;
    bool isConstant() const noexcept override { return text.find_first_not_of("0123456789") == std::string::npos; }
    int64_t getConstantValue() const noexcept override { return std::atoll(text.c_str()); }
    bool isSizeTensor() const noexcept override { return false; }
  } implementation_;
};

class Expressions final : public IExprBuilder {
 public:
  Expressions() { mImpl = &implementation_; }
  ~Expressions() noexcept override {}
  const IDimensionExpr* make(const std::string& text) { return &implementation_.pool.emplace_back(text); }

 private:
  struct Implementation : apiv::VExprBuilder {
    std::deque<Expression> pool;
    const IDimensionExpr* constant(int64_t value) noexcept override {
      return &pool.emplace_back(std::to_string(value));
    }
    const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&,
                                    const IDimensionExpr&) noexcept override {
      fail("the plugin computes with dimensions");
    }
    const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) noexcept override {
      fail("the plugin declares a size tensor");
    }
  } implementation_;
};

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

// Values of fields, freed after the plugin was created: it must not keep pointers to them.
class Fields {
 public:
  Fields(char** begin, char** end) {
    for (char** argument = begin; argument != end; ++argument) {
      const size_t equals = std::strcspn(*argument, "="), colon = std::strcspn(*argument, ":");
      names_.emplace_back(*argument, equals);
      const std::string type(*argument + equals + 1, *argument + colon), value(*argument + colon + 1);
      auto& data = values_.emplace_back();
      if (type == "int64") add(PluginFieldType::kINT64, data, int64_t(std::stoll(value)));
      if (type == "int32") add(PluginFieldType::kINT32, data, int32_t(std::stol(value)));
      if (type == "float32") add(PluginFieldType::kFLOAT32, data, float(std::stod(value)));
      if (type == "float64") add(PluginFieldType::kFLOAT64, data, std::stod(value));
      if (type == "nothing") fields_.emplace_back(names_.back().c_str(), nullptr, PluginFieldType::kFLOAT32, 0);
    }
    collection_ = {int32_t(fields_.size()), fields_.data()};
  }
  const PluginFieldCollection* collection() const { return &collection_; }

 private:
  template <typename Value>
  void add(PluginFieldType type, std::vector<char>& data, Value value) {
    data.resize(sizeof value);
    std::memcpy(data.data(), &value, sizeof value);
    fields_.emplace_back(names_.back().c_str(), data.data(), type, 1);
  }

  std::deque<std::string> names_;
  std::deque<std::vector<char>> values_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_;
};

using Plugin = std::unique_ptr<IPluginV3>;

Plugin create(IPluginCreatorV3One& creator, const PluginFieldCollection* fields, TensorRTPhase phase) {
  Plugin plugin(creator.createPlugin("scoring", fields, phase));
  if (!plugin) std::exit(kNotCreated);
  return plugin;
}

template <typename Capability>
Capability& capability(const Plugin& plugin, PluginCapabilityType type) {
  IPluginCapability* found = plugin->getCapabilityInterface(type);
  require(found != nullptr, "a capability is missing");
  return *static_cast<Capability*>(found);
}
IPluginV3OneCore& core(const Plugin& plugin) {
  return capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
}
IPluginV3OneBuild& build(const Plugin& plugin) {
  return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}
IPluginV3OneRuntime& runtime(const Plugin& plugin) {
  return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

constexpr int kInputs = 3, kOutputs = 3;

const char* name(DataType type) {
  return type == DataType::kFLOAT   ? "float"
         : type == DataType::kHALF  ? "half"
         : type == DataType::kINT64 ? "int64"
                                    : "?";
}

// Every combination that the plugin supports, found as TensorRT does: one tensor after the other, the earlier ones set.
void list_formats(IPluginV3OneBuild& plugin, std::vector<DynamicPluginTensorDesc>& tensors, int position) {
  if (position == kInputs + kOutputs) {
    std::printf("formats");
    for (const DynamicPluginTensorDesc& tensor : tensors) {
      std::printf(" %s%s", name(tensor.desc.type), tensor.desc.format == TensorFormat::kLINEAR ? "" : "(not linear)");
    }
    std::printf("\n");
    return;
  }
  for (const auto type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT8, DataType::kINT32,
                          DataType::kINT64, DataType::kBOOL}) {
    for (const auto format : {TensorFormat::kLINEAR, TensorFormat::kCHW2, TensorFormat::kHWC8, TensorFormat::kCHW32}) {
      tensors[position].desc.type = type;
      tensors[position].desc.format = format;
      if (plugin.supportsFormatCombination(position, tensors.data(), kInputs, kOutputs)) {
        list_formats(plugin, tensors, position + 1);
      }
    }
  }
}

void describe(IPluginCreatorV3One& creator, const Plugin& plugin) {
  const auto same = [&](const char* ours, const char* theirs) { return std::strcmp(ours, theirs) == 0; };
  require(same(creator.getPluginName(), core(plugin).getPluginName()) &&
              same(creator.getPluginVersion(), core(plugin).getPluginVersion()) &&
              same(creator.getPluginNamespace(), core(plugin).getPluginNamespace()),
          "creator and plugin have different names");
  std::printf("plugin '%s' '%s' '%s'\n", creator.getPluginName(), creator.getPluginVersion(),
              creator.getPluginNamespace());
  const PluginFieldCollection* names = creator.getFieldNames();
  std::printf("fields");
  for (int32_t i = 0; i < names->nbFields; ++i) std::printf(" %s", names->fields[i].name);
  std::printf("\n");
  const DataType inputs[kInputs] = {DataType::kHALF, DataType::kHALF, DataType::kFLOAT};
  DataType outputs[kOutputs];
  require(build(plugin).getNbOutputs() == kOutputs, "not three outputs");
  require(build(plugin).getOutputDataTypes(outputs, kOutputs, inputs, kInputs) == 0, "no output types");
  std::printf("outputs %s %s %s\n", name(outputs[0]), name(outputs[1]), name(outputs[2]));
  std::vector<DynamicPluginTensorDesc> tensors(kInputs + kOutputs);
  list_formats(build(plugin), tensors, 0);
  DynamicPluginTensorDesc largest[kInputs + kOutputs] = {};
  for (const int64_t images : {1, 3}) {
    largest[0].max = {4, {images, 8, 4, 5}};
    std::printf("workspace %zu\n", build(plugin).getWorkspaceSize(largest, kInputs, largest + kInputs, kOutputs));
  }
}

void infer(const Plugin& plugin, char** shapes) {
  Expressions expressions;
  DimsExprs inputs[kInputs] = {}, outputs[kOutputs] = {};
  for (int i = 0; i < kInputs; ++i) {
    for (const std::string& size : split(shapes[i], 'x')) inputs[i].d[inputs[i].nbDims++] = expressions.make(size);
  }
  if (build(plugin).getOutputShapes(inputs, kInputs, nullptr, 0, outputs, kOutputs, expressions) != 0) {
    std::exit(kShapesRefused);
  }
  for (const DimsExprs& output : outputs) {
    for (int32_t i = 0; i < output.nbDims; ++i) {
      std::printf("%s%s", i ? "x" : "", static_cast<const Expression*>(output.d[i])->text().c_str());
    }
    std::printf("\n");
  }
}

size_t count(const Dims& shape) {
  return std::accumulate(shape.d, shape.d + shape.nbDims, size_t{1}, std::multiplies<>());
}

std::vector<char> read(size_t bytes) {
  std::vector<char> values(bytes);
  if (bytes > 0) require(std::fread(values.data(), 1, bytes, stdin) == bytes, "stdin is too short");
  return values;
}

void score(const Plugin& plugin, DataType type, char** shapes) {
  PluginTensorDesc inputs[kInputs] = {}, outputs[kOutputs] = {};
  DynamicPluginTensorDesc largest[kInputs + kOutputs] = {};
  std::vector<std::vector<char>> values;
  const void* input_values[kInputs];
  for (int i = 0; i < kInputs; ++i) {
    inputs[i].type = i == 2 ? DataType::kFLOAT : type;
    for (const std::string& size : split(shapes[i], 'x')) inputs[i].dims.d[inputs[i].dims.nbDims++] = std::stoll(size);
    largest[i] = {inputs[i], inputs[i].dims, inputs[i].dims, inputs[i].dims};
    values.push_back(read(count(inputs[i].dims) * (inputs[i].type == DataType::kHALF ? 2 : 4)));
    input_values[i] = values.back().data();
  }
  const int64_t *z = inputs[0].dims.d, images = z[0], height = z[2], width = z[3];
  outputs[0] = {{1, {images}}, DataType::kFLOAT, TensorFormat::kLINEAR, 0};
  outputs[1] = {{3, {images, height, width}}, DataType::kFLOAT, TensorFormat::kLINEAR, 0};
  outputs[2] = {{4, {images, 2, height, width}}, DataType::kINT64, TensorFormat::kLINEAR, 0};
  std::vector<std::vector<char>> results;
  void* output_values[kOutputs];
  for (int i = 0; i < kOutputs; ++i) {
    results.emplace_back(count(outputs[i].dims) * (i == 2 ? 8 : 4));
    output_values[i] = results.back().data();
  }

  std::vector<char> workspace(build(plugin).getWorkspaceSize(largest, kInputs, largest + kInputs, kOutputs));
  const Plugin attached(runtime(plugin).attachToContext(nullptr));
  require(attached && attached != plugin, "attachToContext returns no plugin of its own");
  const bool changed = runtime(attached).onShapeChange(inputs, kInputs, outputs, kOutputs) == 0;
  const int32_t error =
      runtime(attached).enqueue(inputs, outputs, input_values, output_values, workspace.data(), nullptr);
  if (!changed) require(error != 0, "enqueue takes shapes that onShapeChange refuses");
  if (error != 0) std::exit(changed ? kEnqueueFailed : kShapesRefused);
  for (const std::vector<char>& result : results) {
    if (!result.empty()) std::fwrite(result.data(), 1, result.size(), stdout);
  }
}

}  // namespace

int main(int count, char** arguments) {
  require(count >= 3, "two arguments are needed");
  void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) fail(dlerror());
  const auto set_logger_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  const auto get_creators =
      reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  require(set_logger_finder != nullptr && get_creators != nullptr, "a symbol is missing");
  const char* layout = std::getenv("TENSORRT_HOST_LAYOUT");
  set_logger_finder(logger_finder(layout != nullptr && std::strcmp(layout, "11") == 0));
  int32_t creators = 0;
  auto& creator = *static_cast<IPluginCreatorV3One*>(get_creators(creators)[0]);
  require(creators == 1 && std::strcmp(creator.getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0,
          "not one creator of plugins of version 3");

  const std::string command = arguments[2];
  const int shapes = command == "infer" ? 3 : command == "score" ? 4 : 3;
  const int first_field = command == "infer" ? 6 : command == "score" ? 7 : 3;
  Plugin built;
  {
    const Fields fields(arguments + first_field, arguments + count);
    const Plugin original = create(creator, fields.collection(), TensorRTPhase::kBUILD);
    built.reset(original->clone());
  }
  // The engine file keeps what the plugin serialises; another process makes the plugin again from it.
  const Plugin loaded = create(creator, runtime(built).getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
  built.reset();

  if (command == "describe") describe(creator, loaded);
  if (command == "infer") infer(loaded, arguments + shapes);
  if (command == "score") {
    const bool half = std::strcmp(arguments[3], "half") == 0;
    score(loaded, half ? DataType::kHALF : DataType::kFLOAT, arguments + shapes);
  }
  return 0;
}
