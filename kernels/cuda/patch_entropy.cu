// Two kernels. The first is a matrix product, embeddings times prototypes, whose tiles stay on chip: of each tile only
// the minimum, the soft total and the nearest prototype per cell leave it. The second joins them into evidence and
// averages the top cells. The equation is spelled out in reference/patch_entropy.py; ROOFLINE.md says what it costs.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "patch_entropy.hpp"
#include "tensor_core.cuh"

namespace meliad::cuda {
namespace {

// A block of 4 warps multiplies tiles of 64 prototypes and some cells, 32 channels at a time, while the next ones are
// on their way.
constexpr int kThreads = 128, kPrototypes = 64, kDepth = 32;
// Blocks among which the prototypes of a class are divided at most, to fill a device with the cells of one image. It
// does not depend on the device, so that sums are added in the same order on all.
constexpr int kSplits = 8;
constexpr int kFinishThreads = 1024;

// Cells of a tile, and tiles on chip at a time: what the 48 kB of shared memory hold that need no permission.
template <typename Element>
struct Tiling;
template <>
struct Tiling<float> {
  static constexpr int kCells = 32, kStages = 3;
};
template <>
struct Tiling<Half> {
  static constexpr int kCells = 64, kStages = 4;
};

struct ClassSummary {
  float minimum;    // of the distances
  float total;      // sum over k of exp((minimum - d_k) / T)
  int32_t nearest;  // index within the class
};

enum Class { kNormal, kAnomaly, kClasses };

// Sizes are int: what one image or the prototypes hold has fewer than 2^31 elements.
template <typename Element>
struct Problem {
  PatchEntropyBatchOf<Element> batch;
  const Element* prototypes;
  int depth, cells;
  int count[kClasses];   // prototypes of each class
  int splits[kClasses];  // blocks that share them
  PatchEntropyParameters parameters;
  float log2e_over_softness;
  bool aligned;             // rows of z and prototypes may be read 16 bytes at a time
  ClassSummary* summaries;  // [N, kClasses * kSplits, cells], those of normal prototypes first
  float* along;             // [N, cells]: direction . z
  int* finished;            // [N]: blocks of the second kernel
};

// Operands of a tile. The 16 bytes behind each row spread the rows over the banks.
template <typename Element>
struct Stage {
  static constexpr int kCells = Tiling<Element>::kCells, kPadding = 16 / sizeof(Element);
  alignas(16) Element z[kDepth][kCells + kPadding];
  alignas(16) Element prototypes[kPrototypes][kDepth + kPadding];
  alignas(16) float direction[kDepth];
};

__host__ __device__ constexpr int tiles(int64_t size, int tile) { return int((size + tile - 1) / tile); }

// Of the summaries of some sets of prototypes that of all; a class that ends up empty keeps total 0.
template <int kSets>
__device__ ClassSummary join(const ClassSummary (&sets)[kSets], float log2e_over_softness) {
  ClassSummary all = {sets[0].minimum, 0, sets[0].nearest};
#pragma unroll
  for (int i = 1; i < kSets; ++i) {
    const ClassSummary& set = sets[i];
    if (set.minimum < all.minimum || (set.minimum == all.minimum && set.nearest < all.nearest)) {
      all = {set.minimum, 0, set.nearest};
    }
  }
#pragma unroll
  for (int i = 0; i < kSets; ++i) {
    // A total of 0 may come with an infinite minimum, and Inf - Inf must not spoil the others.
    const float scale = fast_exp2((all.minimum - sets[i].minimum) * log2e_over_softness);
    all.total += sets[i].total == 0 ? 0 : sets[i].total * scale;
  }
  return all;
}

// Copies a tile of a matrix, zeros where that ends: of the rows and columns that are left from its corner on.
template <int kRows, int kColumns, typename Element, int kTileColumns>
__device__ __forceinline__ void load_tile(Element (&tile)[kRows][kTileColumns], const Element* corner, int row_length,
                                          int rows, int columns, bool aligned) {
  constexpr int kVector = 16 / sizeof(Element), kVectors = kColumns / kVector;
  static_assert(kRows * kVectors % kThreads == 0, "every thread copies as much");
  const int thread = int(threadIdx.x);
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kRows * kVectors / kThreads; ++i) {
      const int row = thread / kVectors + i * (kThreads / kVectors), column = thread % kVectors * kVector;
      copy_or_zero<16>(&tile[row][column], corner + row * row_length + column, row < rows && column < columns);
    }
  } else {
#pragma unroll 2
    for (int i = thread; i < kRows * kColumns; i += kThreads) {
      const int row = i / kColumns, column = i % kColumns;
      tile[row][column] = row < rows && column < columns ? corner[row * row_length + column] : Element(0.0f);
    }
  }
}

// The shared memory of a block. Groups of threads, the shares, go through the same cells, each with its part of the
// prototypes or channels of a tile.
template <typename Element>
struct Scratch {
  static constexpr int kCells = Tiling<Element>::kCells, kShares = kThreads / kCells;
  union {
    Stage<Element> stages[Tiling<Element>::kStages];
    float products[kPrototypes][kCells + 1];
    ClassSummary shares[kShares][kCells];
  };
  float prototype_norms[kPrototypes];  // squared
  float cell_norms[kCells];
  float partial_norms[2][kThreads];
  float along[kShares][kCells];
};

// What a thread adds up of the product of a tile, and of the squared norms of its rows and columns. In single precision
// on the ordinary cores, because tensor cores would round the operands.
struct SingleProducts {
  static constexpr int kCells = Tiling<float>::kCells, kShares = kThreads / kCells;
  static constexpr int kCellGroups = kCells / 4, kPrototypeGroups = kThreads / kCellGroups;
  float sums[4][4] = {};                    // prototypes group + 16 i, cells 4 group + j
  float prototype_norm = 0, cell_norm = 0;  // over a part of the channels

  __device__ void add(const Stage<float>& stage) {
    const int thread = int(threadIdx.x), cell = thread % kCellGroups * 4, group = thread / kCellGroups;
#pragma unroll 2
    for (int depth = 0; depth < kDepth; depth += 4) {
      float p[4][4], z[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          p[i][j] = stage.prototypes[group + kPrototypeGroups * i][depth + j];
          z[i][j] = stage.z[depth + i][cell + j];
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][j] += p[i][k] * z[k][j];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kDepth / 2; ++i) {
      const float value = stage.prototypes[thread / 2][thread % 2 * (kDepth / 2) + i];
      prototype_norm += value * value;
    }
#pragma unroll
    for (int i = 0; i < kDepth / kShares; ++i) {
      const float value = stage.z[thread / kCells * (kDepth / kShares) + i][thread % kCells];
      cell_norm += value * value;
    }
  }

  __device__ void store(Scratch<float>& scratch) const {
    const int thread = int(threadIdx.x), cell = thread % kCellGroups * 4, group = thread / kCellGroups;
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) scratch.products[group + kPrototypeGroups * i][cell + j] = sums[i][j];
    }
    scratch.partial_norms[0][thread] = prototype_norm;
    scratch.partial_norms[1][thread] = cell_norm;
    __syncthreads();
    float sum = 0;
    if (thread < kPrototypes) {
      for (int i = 0; i < 2; ++i) sum += scratch.partial_norms[0][2 * thread + i];
      scratch.prototype_norms[thread] = sum;
    } else if (thread < kPrototypes + kCells) {
      const int column = thread - kPrototypes;
      for (int i = 0; i < kShares; ++i) sum += scratch.partial_norms[1][column + kCells * i];
      scratch.cell_norms[column] = sum;
    }
  }
};

// The same on tensor cores, which multiply halves exactly: a warp takes 32 prototypes and 32 cells. Squared norms are
// the diagonal of the product of a fragment with itself; of the two warps that share prototypes, and of the two that
// share cells, each does so for 16 of them.
struct HalfProducts {
  static constexpr int kCells = Tiling<Half>::kCells;
  float sums[2][4][4] = {};
  float prototype_squares[2][4] = {}, cell_squares[2][4] = {};

  __device__ static int lane() { return int(threadIdx.x) % 32; }
  __device__ static int prototype_warp() { return int(threadIdx.x) / 32 % 2; }
  __device__ static int cell_warp() { return int(threadIdx.x) / 64; }

  __device__ void add(const Stage<Half>& stage) {
#pragma unroll 1  // unrolled it needs more registers than there are
    for (int depth = 0; depth < kDepth; depth += 16) {
      uint32_t p[2][4], z[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 32 * prototype_warp() + 16 * i + lane() % 16, column = 32 * cell_warp() + 16 * i;
        load_matrices<false>(p[i], &stage.prototypes[row][depth + lane() / 16 * 8]);
        load_matrices<true>(z[i], &stage.z[depth + lane() % 16][column + lane() / 16 * 8]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          multiply_add(sums[i][2 * j], p[i], z[j][0], z[j][1]);
          multiply_add(sums[i][2 * j + 1], p[i], z[j][2], z[j][3]);
        }
      }
      uint32_t own_p[4], own_z[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        constexpr int kTransposed[] = {0, 2, 1, 3};  // quadrants of a right factor as those of a left one
        own_p[i] = cell_warp() == 0 ? p[0][i] : p[1][i];
        own_z[i] = prototype_warp() == 0 ? z[0][kTransposed[i]] : z[1][kTransposed[i]];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply_add(prototype_squares[i], own_p, own_p[i], own_p[i + 2]);
        multiply_add(cell_squares[i], own_z, own_z[i], own_z[i + 2]);
      }
    }
  }

  __device__ void store(Scratch<Half>& scratch) const {
    const int row = lane() / 4, column = 2 * (lane() % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float (*corner)[kCells + 1] = &scratch.products[32 * prototype_warp() + 16 * i + row];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) corner[k / 2 * 8][32 * cell_warp() + 8 * j + column + k % 2] = sums[i][j][k];
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (row != column + k) continue;
        const int own_half = 8 * i + row;
        scratch.prototype_norms[32 * prototype_warp() + 16 * cell_warp() + own_half] = prototype_squares[i][2 * i + k];
        scratch.cell_norms[32 * cell_warp() + 16 * prototype_warp() + own_half] = cell_squares[i][2 * i + k];
      }
    }
  }
};

// Grid: tiles of cells, splits of the normal prototypes and then of the anomalous ones, images.
template <typename Element>
__global__ void __launch_bounds__(kThreads, 4) summarise(Problem<Element> problem) {
  using Products = std::conditional_t<std::is_same<Element, float>::value, SingleProducts, HalfProducts>;
  constexpr int kCells = Tiling<Element>::kCells, kStages = Tiling<Element>::kStages;
  constexpr int kShares = Scratch<Element>::kShares, kShare = kPrototypes / kShares;
  MELIAD_SHARED(Scratch<Element>, scratch);
  const int thread = int(threadIdx.x), own_cell = thread % kCells, share = thread / kCells;
  const int depth = problem.depth, cells = problem.cells, steps = tiles(depth, kDepth);
  const int first_cell = int(blockIdx.x) * kCells, split = int(blockIdx.y);
  const int64_t image = blockIdx.z;
  const Element* z = problem.batch.z + image * depth * cells + first_cell;
  const Class side = split < problem.splits[kNormal] ? kNormal : kAnomaly;
  const Element* prototypes = problem.prototypes + (side == kNormal ? 0 : problem.count[kNormal] * depth);
  const int split_of_class = side == kNormal ? split : split - problem.splits[kNormal];
  const int64_t class_tiles = tiles(problem.count[side], kPrototypes);
  const int first_tile = int(class_tiles * split_of_class / problem.splits[side]);
  const int end_tile = int(class_tiles * (split_of_class + 1) / problem.splits[side]);
  if (thread == 0 && blockIdx.x == 0 && split == 0) problem.finished[image] = 0;

  ClassSummary summary = {INFINITY, 0, 0};
  float along = 0;  // over a share of the channels
  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int first = tile * kPrototypes, left = problem.count[side] - first;
    const bool adds_along = split == 0 && tile == first_tile;
    const Element *next_z = z, *next_prototypes = prototypes + first * depth;
    const float* next_direction = problem.batch.direction + thread;
    int channels = depth;  // that have not been asked for
    const auto load = [&](int step) {
      if (channels > 0) {
        Stage<Element>& stage = scratch.stages[step % kStages];
        load_tile<kDepth, kCells>(stage.z, next_z, cells, channels, cells - first_cell, problem.aligned);
        load_tile<kPrototypes, kDepth>(stage.prototypes, next_prototypes, depth, left, channels, problem.aligned);
        if (adds_along && thread < kDepth) copy_or_zero<4>(&stage.direction[thread], next_direction, thread < channels);
        next_z += kDepth * cells;
        next_prototypes += kDepth;
        next_direction += kDepth;
        channels -= kDepth;
      }
      commit_copies();  // an empty group behind the last step keeps the count
    };

    Products products;
    for (int step = 0; step < kStages - 1; ++step) load(step);
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // the copies of all threads are there, and all are done with the stage that is filled next
      load(step + kStages - 1);
      const Stage<Element>& stage = scratch.stages[step % kStages];
      products.add(stage);
      if (adds_along) {
        for (int i = share; i < kDepth; i += kShares) along += float(stage.z[i][own_cell]) * stage.direction[i];
      }
    }

    __syncthreads();  // the products lie where the stages lay
    products.store(scratch);
    __syncthreads();
    const float cell_norm = scratch.cell_norms[own_cell];
    float distances[kShare];
    ClassSummary pair[2] = {summary, {INFINITY, 0, 0}};
    ClassSummary& of_tile = pair[1];
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int row = share * kShare + i;
      const float squared = cell_norm + scratch.prototype_norms[row] - 2 * scratch.products[row][own_cell];
      // NaN is not less than 0 and stays. Behind the last prototype of the class there is none.
      distances[i] = row < left ? fast_square_root(squared < 0 ? 0 : squared) : INFINITY;
      if (distances[i] < of_tile.minimum) of_tile = {distances[i], 0, first + row};  // the lowest index wins a tie
    }
    const float from = of_tile.minimum == INFINITY ? 0 : of_tile.minimum;  // Inf - Inf would not be nothing
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      of_tile.total += fast_exp2((from - distances[i]) * problem.log2e_over_softness);
    }
    summary = join(pair, problem.log2e_over_softness);
    __syncthreads();  // the stages are filled again, or the summaries are handed over
  }

  scratch.shares[share][own_cell] = summary;
  scratch.along[share][own_cell] = along;
  __syncthreads();
  const int cell = first_cell + own_cell;
  if (cell >= cells) return;
  if (share == 0) {
    ClassSummary sets[kShares];
    for (int i = 0; i < kShares; ++i) sets[i] = scratch.shares[i][own_cell];
    problem.summaries[(image * kClasses * kSplits + split) * cells + cell] = join(sets, problem.log2e_over_softness);
  } else if (share == 1 && split == 0) {
    float total = 0;
    for (int i = 0; i < kShares; ++i) total += scratch.along[i][own_cell];
    problem.along[image * cells + cell] = total;
  }
}

// Evidence of one cell; see the reference. Anything that is not finite becomes NaN.
__device__ float evidence(const PatchEntropyParameters& parameters, const ClassSummary& normal,
                          const ClassSummary& anomaly, float along) {
  const float soft_normal = normal.minimum - parameters.softness * logf(normal.total);
  const float soft_anomaly = anomaly.minimum - parameters.softness * logf(anomaly.total);
  const float x =
      (-parameters.anomaly_scale * soft_anomaly + along + parameters.bias) + parameters.normal_scale * soft_normal;
  const float q = expf(-fabsf(x));
  const float entropy_bits = (log1pf(q) + fabsf(x) * q / (1 + q)) * 1.4426950408889634f;
  const float value = (1 - parameters.kappa * entropy_bits) * x;
  return fabsf(value) < INFINITY ? value : NAN;
}

// Order of these integers = order of the floats.
__device__ uint32_t sortable(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ float from_sortable(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7FFFFFFFu : ~key;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

struct FinishScratch {
  static constexpr int kKept = 4096;
  uint32_t keys[kKept];  // of the first cells; those of the others are made again
  double sums[kFinishThreads];
  bool is_last_block;
};

// The score of one image, by one block. Every thread looks at its own cells only: what is shared are counts and sums.
__device__ void average_top_cells(const float* map, int cells, int top_cells, float offset, float* score,
                                  FinishScratch& scratch) {
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  bool is_undefined = false;
  for (int cell = thread; cell < cells; cell += threads) {
    const float value = __ldcg(&map[cell]);  // of other blocks, too
    if (cell < FinishScratch::kKept) scratch.keys[cell] = sortable(value);
    is_undefined = is_undefined || isnan(value);
  }
  const auto key = [&](int cell) {
    return cell < FinishScratch::kKept ? scratch.keys[cell] : sortable(__ldcg(&map[cell]));
  };

  // Bit by bit the largest key that at least top_cells keys reach; exactly as many will do.
  uint32_t lowest = 0;
  int reached = cells;
  for (uint32_t bit = 1u << 31; bit > 0 && reached > top_cells; bit >>= 1) {
    const uint32_t candidate = lowest | bit;
    int count = 0;
    for (int first = 0; first < cells; first += threads) {
      count += __syncthreads_count(first + thread < cells && key(first + thread) >= candidate);
    }
    if (count >= top_cells) {
      lowest = candidate;
      reached = count;
    }
  }
  const int undefined = __syncthreads_count(is_undefined);
  double sum = 0;
  for (int cell = thread; cell < cells; cell += threads) {
    if (key(cell) >= lowest) sum += from_sortable(key(cell));
  }
  scratch.sums[thread] = sum;
  for (int step = kFinishThreads / 2; step > 0; step /= 2) {
    if (step >= threads) continue;
    __syncthreads();
    if (thread < step && thread + step < threads) scratch.sums[thread] += scratch.sums[thread + step];
  }
  if (thread == 0) {
    // Of equal cells as many as needed.
    const double beyond = reached > top_cells ? (reached - top_cells) * double(from_sortable(lowest)) : 0;
    *score = undefined > 0 ? NAN : float((scratch.sums[0] - beyond) / top_cells + offset);
  }
}

// Grid: tiles of cells, images. The block of an image that ends last goes on with the whole map.
template <typename Element>
__global__ void __launch_bounds__(kFinishThreads, 1) finish(Problem<Element> problem) {
  MELIAD_SHARED(FinishScratch, scratch);
  const int cells = problem.cells, cell = int(blockIdx.x * blockDim.x + threadIdx.x);
  const int64_t image = blockIdx.y;
  float* map = problem.batch.map + image * cells;
  if (cell < cells) {
    const ClassSummary* summaries = problem.summaries + image * kClasses * kSplits * cells + cell;
    int64_t* nearest = problem.batch.nearest + image * kClasses * cells + cell;
    ClassSummary of_class[kClasses];
#pragma unroll
    for (int side = 0; side < kClasses; ++side) {
      ClassSummary sets[kSplits];
#pragma unroll
      for (int i = 0; i < kSplits; ++i) {
        const int split = side == kNormal ? i : problem.splits[kNormal] + i;
        sets[i] = i < problem.splits[side] ? summaries[int64_t(split) * cells] : ClassSummary{INFINITY, 0, INT32_MAX};
      }
      of_class[side] = join(sets, problem.log2e_over_softness);
    }
    map[cell] =
        evidence(problem.parameters, of_class[kNormal], of_class[kAnomaly], problem.along[image * cells + cell]);
    nearest[0] = of_class[kNormal].nearest;
    nearest[cells] = problem.count[kNormal] + of_class[kAnomaly].nearest;
  }
  if (gridDim.x > 1) {
    __threadfence();  // what this thread wrote is seen before the count
    __syncthreads();
    if (threadIdx.x == 0) scratch.is_last_block = atomicAdd(&problem.finished[image], 1) == int(gridDim.x) - 1;
    __syncthreads();
    if (!scratch.is_last_block) return;
    __threadfence();
  }
  average_top_cells(map, cells, int(problem.parameters.top_cells), problem.parameters.offset,
                    &problem.batch.score[image], scratch);
}

size_t rounded_to_16(size_t bytes) { return (bytes + 15) / 16 * 16; }

size_t summary_bytes(int64_t images, int64_t cells) {
  return rounded_to_16(size_t(images) * kClasses * kSplits * size_t(cells) * sizeof(ClassSummary));
}

size_t along_bytes(int64_t images, int64_t cells) {
  return rounded_to_16(size_t(images) * size_t(cells) * sizeof(float));
}

}  // namespace

size_t workspace_bytes(int64_t images, int64_t cells) {
  return summary_bytes(images, cells) + along_bytes(images, cells) + size_t(images) * sizeof(int);
}

template <typename Element>
cudaError_t score_patches(const PatchEntropyParameters& parameters, const Element* prototypes, int64_t count,
                          const PatchEntropyBatchOf<Element>& batch, void* workspace, cudaStream_t stream) {
  constexpr int64_t kMostImages = 65535;       // in the second or third dimension of a grid
  constexpr int64_t kMostOnASide = 1LL << 24;  // so that a tile of rows has fewer than 2^31 elements, too
  const bool fits = batch.images > 0 && batch.images <= kMostImages && batch.depth > 0 && batch.cells > 0 &&
                    batch.cells <= kMostOnASide && batch.depth <= kMostOnASide &&
                    batch.cells <= INT32_MAX / batch.depth && count <= INT32_MAX / batch.depth &&
                    parameters.n_normal >= 1 && parameters.n_normal < count && parameters.top_cells >= 1 &&
                    parameters.top_cells <= batch.cells;
  if (!fits) return cudaErrorInvalidValue;

  constexpr int64_t kVector = 16 / sizeof(Element);
  Problem<Element> problem;
  problem.batch = batch;
  problem.prototypes = prototypes;
  problem.depth = int(batch.depth);
  problem.cells = int(batch.cells);
  problem.count[kNormal] = int(parameters.n_normal);
  problem.count[kAnomaly] = int(count - parameters.n_normal);
  for (int side = 0; side < kClasses; ++side) {
    problem.splits[side] = std::min(tiles(problem.count[side], kPrototypes), kSplits);
  }
  problem.parameters = parameters;
  problem.log2e_over_softness = float(1 / (std::log(2.0) * parameters.softness));
  problem.aligned = batch.depth % kVector == 0 && batch.cells % kVector == 0 &&
                    reinterpret_cast<uintptr_t>(batch.z) % 16 == 0 && reinterpret_cast<uintptr_t>(prototypes) % 16 == 0;
  char* memory = static_cast<char*>(workspace);
  problem.summaries = reinterpret_cast<ClassSummary*>(memory);
  problem.along = reinterpret_cast<float*>(memory += summary_bytes(batch.images, batch.cells));
  problem.finished = reinterpret_cast<int*>(memory += along_bytes(batch.images, batch.cells));

  const auto images = unsigned(batch.images);
  const int splits = problem.splits[kNormal] + problem.splits[kAnomaly];
  const cudaError_t error =
      launch(summarise<Element>, dim3(unsigned(tiles(batch.cells, Tiling<Element>::kCells)), unsigned(splits), images),
             kThreads, stream, problem);
  if (error != cudaSuccess) return error;
  const int threads = std::min(32 * tiles(batch.cells, 32), kFinishThreads);
  return launch(finish<Element>, dim3(unsigned(tiles(batch.cells, threads)), images), unsigned(threads), stream,
                problem);
}

template cudaError_t score_patches(const PatchEntropyParameters&, const float*, int64_t,
                                   const PatchEntropyBatchOf<float>&, void*, cudaStream_t);
template cudaError_t score_patches(const PatchEntropyParameters&, const Half*, int64_t,
                                   const PatchEntropyBatchOf<Half>&, void*, cudaStream_t);

}  // namespace meliad::cuda
