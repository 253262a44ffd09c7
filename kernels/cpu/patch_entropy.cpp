#include "patch_entropy.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "../parameters.hpp"
#include "patch_entropy_amx.hpp"
#include "patch_entropy_vnni.hpp"

namespace meliad::cpu {
namespace {

#ifdef __x86_64__
// 32 vector registers.
namespace avx512 {
constexpr int kLanes = 16, kPrototypes = 12;
#define MELIAD_TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma")))
#include "patch_entropy_inner_loops.hpp"
#undef MELIAD_TARGET
}  // namespace avx512

// 16 vector registers.
namespace avx2 {
constexpr int kLanes = 8, kPrototypes = 6;
#define MELIAD_TARGET __attribute__((target("avx2,fma")))
#include "patch_entropy_inner_loops.hpp"
#undef MELIAD_TARGET
}  // namespace avx2
#endif

namespace baseline {
#ifdef __x86_64__
constexpr int kLanes = 4, kPrototypes = 6;  // SSE2: 16 vector registers
#else
constexpr int kLanes = 4, kPrototypes = 12;  // NEON: 32 vector registers
#endif
#define MELIAD_TARGET
#include "patch_entropy_inner_loops.hpp"
#undef MELIAD_TARGET
}  // namespace baseline

// Shape of the tile and its compiled code for one instruction set.
struct TileKernel {
  int cells;
  int prototypes;
  void (*score_tile)(const TileInput&, TileSummary&);
};

TileKernel tile_kernel(InstructionSet instruction_set) {
  switch (instruction_set) {
#ifdef __x86_64__
    case InstructionSet::kAmx:
      return {amx::kCells, amx::kPrototypes, amx::score_tile};
    case InstructionSet::kVnni:
      return {vnni::kCells, vnni::kPrototypes, vnni::score_tile};
    case InstructionSet::kAvx512:
      return {avx512::kCells, avx512::kPrototypes, avx512::score_tile};
    case InstructionSet::kAvx2:
      return {avx2::kCells, avx2::kPrototypes, avx2::score_tile};
#endif
    default:
      return {baseline::kCells, baseline::kPrototypes, baseline::score_tile};
  }
}

// Scratch memory of the calling thread, aligned for every instruction set; it grows to the largest model and stays.
float* thread_scratch(int64_t floats) {
  struct alignas(64) CacheLine {
    float values[16];
  };
  thread_local std::vector<CacheLine> scratch;
  const size_t lines = size_t(floats + 15) / 16;
  if (scratch.size() < lines) scratch.resize(lines);
  return scratch.data()->values;
}

PatchEntropyParameters checked(const PatchEntropyParameters& parameters, int64_t count) {
  check_classes(parameters, count);
  check_parameters(parameters);
  return parameters;
}

// Evidence of one cell from the summaries of its distances; anything that is not finite becomes NaN, so that a cell
// that cannot be scored never looks normal. Double precision costs nothing here and keeps the differences exact.
float evidence(const PatchEntropyParameters& parameters, const TileSummary& summary, int64_t cell) {
  const auto soft_minimum = [&](const ClassSummary& side) {
    return side.minimum[cell] - double(parameters.softness) * std::log(double(side.total[cell]));
  };
  const double activation_normal = -parameters.normal_scale * soft_minimum(summary.normal);
  const double activation_anomaly =
      -parameters.anomaly_scale * soft_minimum(summary.anomaly) + summary.along[cell] + parameters.bias;
  const double x = activation_anomaly - activation_normal;
  // Entropy of p = sigmoid(x) in bits, written in q = exp(-|x|) to keep its tails exact.
  const double q = std::exp(-std::fabs(x));
  const double entropy_bits = (std::log1p(q) + std::fabs(x) * q / (1 + q)) / std::log(2.0);
  const float value = float((1 - parameters.kappa * entropy_bits) * x);
  return std::isfinite(value) ? value : std::numeric_limits<float>::quiet_NaN();
}

}  // namespace

PatchEntropyScorer::PatchEntropyScorer(const PatchEntropyParameters& parameters, const float* prototypes, int64_t count,
                                       int64_t depth, InstructionSet instruction_set)
    : parameters_(checked(parameters, count)),
      depth_(depth),
      instruction_set_(std::min(instruction_set, best_instruction_set())) {
  const float* const anomalies = prototypes + parameters.n_normal * depth;
  const int64_t anomaly_count = count - parameters.n_normal;
#ifdef __x86_64__
  const auto both = [&](auto pays) {
    return pays(prototypes, parameters.n_normal, depth, parameters.softness) &&
           pays(anomalies, anomaly_count, depth, parameters.softness);
  };
  if (instruction_set_ == InstructionSet::kAmx && !(both(amx::pays) && amx::permitted())) {
    instruction_set_ = InstructionSet::kVnni;
  }
  if (instruction_set_ == InstructionSet::kVnni && !both(vnni::pays)) instruction_set_ = InstructionSet::kAvx512;
#endif
  normal_ = pack(prototypes, parameters.n_normal);
  anomaly_ = pack(anomalies, anomaly_count);
}

PackedClass PatchEntropyScorer::pack(const float* prototypes, int64_t count) const {
  const int64_t width = tile_kernel(instruction_set_).prototypes;
  PackedClass packed;
  packed.count = count;
  packed.panel_count = (count + width - 1) / width;
  packed.squared_norms.assign(size_t(packed.panel_count * width), std::numeric_limits<float>::infinity());
  for (int64_t k = 0; k < count; ++k) {
    double squared_norm = 0;
    for (int64_t i = 0; i < depth_; ++i) {
      squared_norm += double(prototypes[k * depth_ + i]) * prototypes[k * depth_ + i];
    }
    packed.squared_norms[size_t(k)] = float(squared_norm);
  }
#ifdef __x86_64__
  if (instruction_set_ == InstructionSet::kAmx) {
    amx::pack(prototypes, count, depth_, parameters_.softness, packed);
    return packed;
  }
  if (instruction_set_ == InstructionSet::kVnni) {
    vnni::pack(prototypes, count, depth_, parameters_.softness, packed);
    return packed;
  }
#endif
  packed.panels.assign(size_t(packed.panel_count * width * depth_), 0.0f);
  for (int64_t k = 0; k < count; ++k) {
    float* panel = packed.panels.data() + k / width * width * depth_;
    for (int64_t i = 0; i < depth_; ++i) panel[i * width + k % width] = prototypes[k * depth_ + i];
  }
  return packed;
}

int64_t PatchEntropyScorer::tiles_per_image(const PatchEntropyBatch& batch) const {
  const int64_t cells = tile_kernel(instruction_set_).cells;
  return (batch.cells + cells - 1) / cells;
}

int64_t PatchEntropyScorer::scratch_size() const {
#ifdef __x86_64__
  if (instruction_set_ == InstructionSet::kAmx) return amx::scratch_size(depth_);
  if (instruction_set_ == InstructionSet::kVnni) return vnni::scratch_size(depth_);
#endif
  return depth_ * tile_kernel(instruction_set_).cells;
}

void PatchEntropyScorer::score_tile(const PatchEntropyBatch& batch, int64_t tile) const {
  const TileKernel kernel = tile_kernel(instruction_set_);
  const int64_t image = tile / tiles_per_image(batch);
  const int64_t first = tile % tiles_per_image(batch) * kernel.cells;
  TileInput input;
  input.z = batch.z + image * depth_ * batch.cells + first;
  input.row_stride = batch.cells;
  input.depth = depth_;
  input.valid = std::min<int64_t>(kernel.cells, batch.cells - first);
  input.direction = batch.direction;
  input.normal = &normal_;
  input.anomaly = &anomaly_;
  input.log2e_over_softness = float(1 / (std::log(2.0) * parameters_.softness));
  input.scratch = thread_scratch(scratch_size());

  alignas(64) TileSummary summary;
  kernel.score_tile(input, summary);

  float* map = batch.map + image * batch.cells + first;
  int64_t* nearest = batch.nearest + 2 * image * batch.cells + first;
  for (int64_t cell = 0; cell < input.valid; ++cell) {
    map[cell] = evidence(parameters_, summary, cell);
    nearest[cell] = summary.normal.nearest[cell];
    nearest[batch.cells + cell] = parameters_.n_normal + summary.anomaly.nearest[cell];
  }
}

void PatchEntropyScorer::score_images(const PatchEntropyBatch& batch) const {
  float* cells = thread_scratch(batch.cells);
  for (int64_t image = 0; image < batch.images; ++image) {
    const float* map = batch.map + image * batch.cells;
    if (std::any_of(map, map + batch.cells, [](float value) { return std::isnan(value); })) {
      batch.score[image] = std::numeric_limits<float>::quiet_NaN();  // NaN has no rank
      continue;
    }
    std::copy(map, map + batch.cells, cells);
    std::nth_element(cells, cells + parameters_.top_cells - 1, cells + batch.cells, std::greater<>());
    double total = 0;
    for (int64_t i = 0; i < parameters_.top_cells; ++i) total += cells[i];
    batch.score[image] = float(total / double(parameters_.top_cells) + parameters_.offset);
  }
}

}  // namespace meliad::cpu
