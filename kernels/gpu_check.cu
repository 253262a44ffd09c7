// Checks the CUDA kernels on the GPU of this machine against the definition, times them, and says how far they are from
// what its memory and arithmetic allow. Prints a report in Markdown; ends with 1 where a result is wrong. gpu_check.sh
// builds and runs it; the tests run it on the CPU, without times.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "cuda/patch_entropy.hpp"
#include "cuda/preprocess.hpp"
#include "reference/patch_entropy.hpp"
#include "reference/preprocess.hpp"

namespace {

using meliad::PatchEntropyBatch;
using meliad::PatchEntropyBatchOf;
using meliad::PatchEntropyParameters;
using meliad::cuda::Size;

void require_success(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "gpu_check: %s: CUDA error %d (%s)\n", what, int(error), cudaGetErrorString(error));
  std::exit(2);
}

// Device memory with the values of a vector, or uninitialised.
template <typename Value>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    require_success(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(Value)), "cudaMalloc");
  }
  explicit DeviceArray(const std::vector<Value>& values) : DeviceArray(values.size()) {
    require_success(cudaMemcpy(data_, values.data(), count_ * sizeof(Value), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  Value* data() const { return data_; }
  std::vector<Value> to_host() const {
    std::vector<Value> values(count_);
    require_success(cudaMemcpy(values.data(), data_, count_ * sizeof(Value), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }

 private:
  size_t count_;
  Value* data_ = nullptr;
};

struct Shape {
  int64_t images, depth, cells, prototypes, n_normal;
};

struct Outputs {
  std::vector<float> score, map;
  std::vector<int64_t> nearest;
  explicit Outputs(const Shape& shape)
      : score(shape.images), map(shape.images * shape.cells), nearest(2 * shape.images * shape.cells) {}
};

PatchEntropyParameters parameters_for(const Shape& shape) {
  return {shape.n_normal, std::max<int64_t>(1, shape.cells / 20), 0.01f, 1.1f, 0.33f, -0.5f, 0.5f, 0.25f};
}

// Standard normal values that Element represents exactly.
template <typename Element>
std::vector<float> random_values(size_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = float(Element(normal(random)));
  return values;
}

template <typename Element>
std::vector<Element> converted(const std::vector<float>& values) {
  std::vector<Element> elements;
  for (const float value : values) elements.push_back(Element(value));
  return elements;
}

// Inputs of one shape, on the host and on the device.
template <typename Element>
struct Problem {
  Shape shape;
  PatchEntropyParameters parameters;
  std::vector<float> z, prototypes, direction;
  DeviceArray<Element> device_z, device_prototypes;
  DeviceArray<float> device_direction, score, map;
  DeviceArray<int64_t> nearest;
  DeviceArray<char> workspace;

  Problem(const Shape& shape, std::mt19937& random)
      : shape(shape),
        parameters(parameters_for(shape)),
        z(random_values<Element>(size_t(shape.images * shape.depth * shape.cells), random)),
        prototypes(random_values<Element>(size_t(shape.prototypes * shape.depth), random)),
        direction(random_values<float>(size_t(shape.depth), random)),
        device_z(converted<Element>(z)),
        device_prototypes(converted<Element>(prototypes)),
        device_direction(direction),
        score(size_t(shape.images)),
        map(size_t(shape.images * shape.cells)),
        nearest(size_t(2 * shape.images * shape.cells)),
        workspace(meliad::cuda::workspace_bytes(shape.images, shape.cells)) {}

  void enqueue() {
    const PatchEntropyBatchOf<Element> batch{
        shape.images, shape.depth, shape.cells,   device_z.data(), device_direction.data(),
        score.data(), map.data(),  nearest.data()};
    require_success(meliad::cuda::score_patches(parameters, device_prototypes.data(), shape.prototypes, batch,
                                                workspace.data(), nullptr),
                    "score_patches");
  }
};

template <typename Real, typename Element>
Outputs on_host(const Problem<Element>& problem) {
  Outputs outputs(problem.shape);
  const PatchEntropyBatch batch{problem.shape.images, problem.shape.depth,      problem.shape.cells,
                                problem.z.data(),     problem.direction.data(), outputs.score.data(),
                                outputs.map.data(),   outputs.nearest.data()};
  meliad::reference::patch_entropy_score<Real>(problem.parameters, problem.prototypes.data(), problem.shape.prototypes,
                                               batch);
  return outputs;
}

double root_mean_square(const std::vector<float>& values, const std::vector<float>& exact) {
  double sum = 0;
  for (size_t i = 0; i < values.size(); ++i) sum += std::pow(double(values[i]) - exact[i], 2);
  return std::sqrt(sum / double(values.size()));
}

std::string to_text(const Shape& shape) {
  return std::to_string(shape.images) + " x " + std::to_string(shape.cells) + " patches, depth " +
         std::to_string(shape.depth) + ", " + std::to_string(shape.prototypes) + " prototypes";
}

template <typename Element>
bool check(const Shape& shape, const char* precision, std::mt19937& random) {
  Problem<Element> problem(shape, random);
  problem.enqueue();
  require_success(cudaDeviceSynchronize(), "synchronisation");
  const Outputs exact = on_host<double>(problem), plain = on_host<float>(problem);
  const double error = root_mean_square(problem.map.to_host(), exact.map);
  // Where the plain version is exact by luck, a few roundings are allowed.
  const std::vector<float> zeros(exact.map.size());
  const double allowed = 2 * root_mean_square(plain.map, exact.map) + 5e-7 * root_mean_square(exact.map, zeros);
  const double score_error = root_mean_square(problem.score.to_host(), exact.score);
  const std::vector<int64_t> nearest = problem.nearest.to_host();
  size_t other = 0;
  for (size_t i = 0; i < nearest.size(); ++i) other += nearest[i] != exact.nearest[i];
  // Prototypes at the same distance up to rounding may be exchanged.
  const bool right = error <= allowed && score_error <= 1e-4 && other <= 1 + nearest.size() / 1000;
  std::printf("| %s | %s | %.2e | %.2e | %.2e | %zu of %zu | %s |\n", to_text(shape).c_str(), precision, error, allowed,
              score_error, other, nearest.size(), right ? "right" : "**WRONG**");
  return right;
}

// Compares bytes with the definition, which does not round to fractions of a level as OpenCV and the kernel do: up to
// one level and an eighth is right.
bool check_resize(const Size& frame, const Size& model, std::mt19937& random) {
  std::vector<uint8_t> pixels(size_t(3) * frame.height * frame.width);
  for (uint8_t& value : pixels) value = uint8_t(random());
  const DeviceArray<uint8_t> device_pixels(pixels);
  const DeviceArray<uint8_t> image(size_t(3) * model.height * model.width);
  const auto plan = meliad::cuda::plan_resize(frame, model);
  require_success(
      meliad::cuda::preprocess(plan, {device_pixels.data(), 3 * frame.width, meliad::cuda::ChannelOrder::kRgb},
                               image.data(), nullptr),
      "preprocess");
  require_success(cudaDeviceSynchronize(), "synchronisation");
  const std::vector<double> exact = meliad::reference::resize(plan, pixels);
  const std::vector<uint8_t> bytes = image.to_host();
  double largest = 0;
  size_t beyond = 0;
  for (size_t i = 0; i < bytes.size(); ++i) {
    const double difference = std::fabs(bytes[i] - exact[i]);
    largest = std::max(largest, difference);
    beyond += difference > 0.5;
  }
  const bool right = largest <= 1.13 && beyond <= bytes.size() / 4;
  std::printf("| %d x %d | %d x %d | %.2f | %.1f %% | %s |\n", frame.width, frame.height, model.width, model.height,
              largest, 100.0 * double(beyond) / double(bytes.size()), right ? "right" : "**WRONG**");
  return right;
}

#ifndef MELIAD_CUDA_ON_CPU

// Peaks from what the driver says; products per clock and multiprocessor from NVIDIA's tables by architecture.
struct Peaks {
  double bytes_per_s, single_flops, half_flops;
};

Peaks peaks_of(const cudaDeviceProp& device) {
  int clock_khz = 0, memory_khz = 0;
  cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, 0);
  cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, 0);
  const double clock = 1e3 * clock_khz * device.multiProcessorCount;
  // Dense, sums in single precision.
  const bool has_large_cores = device.major == 8 && (device.minor == 0 || device.minor == 7);
  const double half_per_clock = device.major >= 9 ? 4096 : has_large_cores ? 2048 : 1024;
  const double single_per_clock = device.major == 8 && device.minor == 0 ? 128 : 256;
  // Jetsons share the memory of the CPU, whose rate the driver does not tell: the data sheet of AGX Orin and Thor does.
  const double shared = device.major == 8 ? 204.8e9 : 273e9;
  const double own = 2e3 * memory_khz * device.memoryBusWidth / 8;
  return {device.integrated ? shared : own, clock * single_per_clock, clock * half_per_clock};
}

// Mean microseconds of 200 enqueued runs.
template <typename Enqueue>
double time_us(Enqueue&& enqueue) {
  constexpr int kRuns = 200;
  for (int i = 0; i < 20; ++i) enqueue();
  cudaEvent_t begin, end;
  require_success(cudaEventCreate(&begin), "event");
  require_success(cudaEventCreate(&end), "event");
  require_success(cudaEventRecord(begin), "event");
  for (int i = 0; i < kRuns; ++i) enqueue();
  require_success(cudaEventRecord(end), "event");
  require_success(cudaEventSynchronize(end), "event");
  float ms = 0;
  require_success(cudaEventElapsedTime(&ms, begin, end), "event");
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return 1e3 * ms / kRuns;
}

void print_time(const std::string& what, const char* precision, double us, double arithmetic_us, double memory_us) {
  std::printf("| %s | %s | %.1f | %.2f | %.2f | %.0f %% |\n", what.c_str(), precision, us, arithmetic_us, memory_us,
              100 * std::max(arithmetic_us, memory_us) / us);
}

template <typename Element>
void time_scoring(const Shape& shape, const char* precision, const Peaks& peaks, std::mt19937& random) {
  Problem<Element> problem(shape, random);
  const double us = time_us([&] { problem.enqueue(); });
  const double flop = 2.0 * double(shape.images * shape.cells * shape.prototypes * shape.depth);
  const double bytes = double(sizeof(Element)) * double(shape.depth * (shape.images * shape.cells + shape.prototypes)) +
                       20.0 * double(shape.images * shape.cells);
  print_time(to_text(shape), precision, us, 1e6 * flop / (sizeof(Element) == 2 ? peaks.half_flops : peaks.single_flops),
             1e6 * bytes / peaks.bytes_per_s);
}

void time_preprocessing(int32_t height, int32_t width, const Peaks& peaks) {
  const int64_t read = int64_t{3} * height * width, written = 3 * 256 * 256;
  const DeviceArray<uint8_t> pixels(std::vector<uint8_t>(size_t(read), 100));
  const DeviceArray<uint8_t> image{size_t(written)};
  const meliad::cuda::ResizePlan plan = meliad::cuda::plan_resize({height, width}, {256, 256});
  const double us = time_us([&] {
    require_success(meliad::cuda::preprocess(plan, {pixels.data(), 3 * width, meliad::cuda::ChannelOrder::kBgr},
                                             image.data(), nullptr),
                    "preprocess");
  });
  print_time("frame of " + std::to_string(width) + " x " + std::to_string(height) + " to 256 x 256", "uint8", us, 0,
             1e6 * double(read + written) / peaks.bytes_per_s);
}

#endif

}  // namespace

int main(int count, char** arguments) {
  // --check leaves the times out, for sanitizers.
  [[maybe_unused]] const bool with_times = !(count > 1 && std::string(arguments[1]) == "--check");
#ifdef MELIAD_CUDA_ON_CPU
  std::printf("# CUDA kernels, executed on the CPU: no times\n");
#else
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "gpu_check: there is no CUDA device here, or no driver for it: nvidia-smi tells more\n");
    return 2;
  }
  cudaDeviceProp device;
  require_success(cudaGetDeviceProperties(&device, 0), "device");
  if (device.major < 8) {
    std::fprintf(stderr, "gpu_check: %s is sm_%d%d; the kernels need sm_80 or newer\n", device.name, device.major,
                 device.minor);
    return 2;
  }
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  std::printf("# CUDA kernels on %s\n\nsm_%d%d, %d multiprocessors, CUDA %d.%d, driver for %d.%d\n", device.name,
              device.major, device.minor, device.multiProcessorCount, runtime / 1000, runtime % 1000 / 10,
              driver / 1000, driver % 1000 / 10);
#endif
  const unsigned seed = std::random_device{}();
  std::mt19937 random(seed);
  std::printf("\nSeed of the inputs: %u\n", seed);
  std::printf(
      "\n## Error against the definition in double precision\n\n"
      "| shape | precision | map, RMS | allowed: twice plain floats | score, RMS | other nearest | |\n"
      "|---|---|---|---|---|---|---|\n");
  bool right = true;
  for (const Shape& shape : {Shape{1, 432, 256, 640, 512}, Shape{3, 33, 35, 41, 29}, Shape{2, 65, 100, 300, 299},
                             Shape{1, 1, 1, 2, 1}, Shape{8, 128, 64, 200, 10}, Shape{2, 40, 5000, 1200, 600}}) {
    right = check<float>(shape, "FP32", random) && right;
    right = check<meliad::cuda::Half>(shape, "FP16", random) && right;
  }
  std::printf(
      "\n## Resize against the definition\n\n| frame | model | largest difference | beyond half a level | |\n"
      "|---|---|---|---|---|\n");
  for (const auto& [frame, model] :
       {std::pair{Size{720, 1280}, Size{256, 256}}, std::pair{Size{480, 640}, Size{256, 256}},
        std::pair{Size{481, 641}, Size{256, 320}}, std::pair{Size{100, 90}, Size{128, 96}}}) {
    right = check_resize(frame, model, random) && right;
  }
#ifndef MELIAD_CUDA_ON_CPU
  if (!with_times) return right ? 0 : 1;
  const Peaks peaks = peaks_of(device);
  std::printf(
      "\n## Time\n\nMean of 200 runs enqueued one after the other; limits from %.0f GB/s, %.2f TFLOP/s in FP32, %.1f "
      "on "
      "tensor cores.\n\n"
      "| work | precision | microseconds | arithmetic needs | memory needs | of the limit "
      "|\n|---|---|---|---|---|---|\n",
      peaks.bytes_per_s / 1e9, peaks.single_flops / 1e12, peaks.half_flops / 1e12);
  for (const int64_t cells : {256, 1024, 4096}) {
    time_scoring<float>({1, 432, cells, 640, 512}, "FP32", peaks, random);
    time_scoring<meliad::cuda::Half>({1, 432, cells, 640, 512}, "FP16", peaks, random);
  }
  time_scoring<meliad::cuda::Half>({32, 432, 256, 640, 512}, "FP16", peaks, random);
  time_preprocessing(720, 1280, peaks);
  time_preprocessing(1080, 1920, peaks);
#endif
  return right ? 0 : 1;
}
