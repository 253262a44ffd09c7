// Three kernels. The first is a matrix product, embeddings times prototypes, whose tiles stay on chip: of each tile
// only the minimum, the soft total and the nearest prototype per cell leave it. The second joins them into evidence,
// the third averages the top cells. The equation is spelled out in reference/patch_entropy.py; ROOFLINE.md says what
// it costs.
#include <cmath>
#include <type_traits>

#include "patch_entropy.hpp"
#include "tensor_core.cuh"

namespace meliad::cuda {
namespace {

// A block of 4 warps multiplies tiles of 64 prototypes and 32 cells, 32 channels at a time.
constexpr int kThreads = 128, kCells = 32, kPrototypes = 64, kDepth = 32;
// Groups of threads that go through the same cells, each with its share of the prototypes or channels of a tile.
constexpr int kShares = kThreads / kCells;
// Blocks among which the prototypes are divided, to fill a device with the cells of one image. Always as many, so that
// sums are added in the same order on every device.
constexpr int kSplits = 8;
constexpr int kJoinThreads = 128;
constexpr int kTopThreads = 256;

struct ClassSummary {
  float minimum;    // of the distances
  float total;      // sum over k of exp((minimum - d_k) / T)
  int32_t nearest;  // index within the class
};

enum Class { kNormal, kAnomaly, kClasses };

template <typename Element>
struct Problem {
  PatchEntropyBatchOf<Element> batch;
  const Element* prototypes;
  int64_t count[kClasses];  // prototypes of each class
  PatchEntropyParameters parameters;
  float log2e_over_softness;
  bool aligned;             // rows of z and prototypes may be read 16 bytes at a time
  ClassSummary* summaries;  // [N, kSplits, kClasses, cells]
  float* along;             // [N, cells]: direction . z
};

// Tiles of the operands. The 16 bytes behind each row spread the rows over the banks.
template <typename Element>
struct Stage {
  static constexpr int kPadding = 16 / sizeof(Element);
  alignas(16) Element z[kDepth][kCells + kPadding];
  alignas(16) Element prototypes[kPrototypes][kDepth + kPadding];
};

__host__ __device__ int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Of the summaries of two sets of prototypes that of both; a class that ends up empty keeps total 0.
__device__ ClassSummary join(const ClassSummary& a, const ClassSummary& b, float log2e_over_softness) {
  ClassSummary both;
  const bool b_is_nearer = b.minimum < a.minimum || (b.minimum == a.minimum && b.nearest < a.nearest);
  both.minimum = b_is_nearer ? b.minimum : a.minimum;
  both.nearest = b_is_nearer ? b.nearest : a.nearest;
  // A total of 0 may come with an infinite minimum, and Inf - Inf must not spoil the other total.
  both.total = (a.total == 0 ? 0 : a.total * exp2f((both.minimum - a.minimum) * log2e_over_softness)) +
               (b.total == 0 ? 0 : b.total * exp2f((both.minimum - b.minimum) * log2e_over_softness));
  return both;
}

// Copies rows [first_row, first_row + kRows) and columns [first_column, first_column + kColumns) of a matrix with
// row_length columns into a tile, zeros where the matrix ends.
template <int kRows, int kColumns, typename Element, int kTileColumns>
__device__ void load_tile(Element (&tile)[kRows][kTileColumns], const Element* matrix, int64_t rows, int64_t row_length,
                          int64_t first_row, int64_t first_column, bool aligned) {
  constexpr int kVector = 16 / sizeof(Element);
  if (aligned) {
    for (int i = int(threadIdx.x); i < kRows * kColumns / kVector; i += kThreads) {
      const int row = i / (kColumns / kVector), column = i % (kColumns / kVector) * kVector;
      if (first_row + row < rows && first_column + column < row_length) {
        copy_16_bytes(&tile[row][column], matrix + (first_row + row) * row_length + first_column + column);
      } else {
        for (int j = 0; j < kVector; ++j) tile[row][column + j] = Element(0.0f);
      }
    }
  } else {
#pragma unroll 2
    for (int i = int(threadIdx.x); i < kRows * kColumns; i += kThreads) {
      const int row = i / kColumns, column = i % kColumns;
      const bool inside = first_row + row < rows && first_column + column < row_length;
      tile[row][column] = inside ? matrix[(first_row + row) * row_length + first_column + column] : Element(0.0f);
    }
  }
}

// The 16 products of a thread, and where they belong in the tile: in single precision on the ordinary cores, because
// tensor cores would round the operands.
struct SingleProducts {
  static constexpr int kCellGroups = kCells / 4, kPrototypeGroups = kThreads / kCellGroups;
  float sums[4][4] = {};  // prototypes group + 16 i, cells 4 group + j

  __device__ void add(const Stage<float>& stage) {
    const int cell = int(threadIdx.x) % kCellGroups * 4, group = int(threadIdx.x) / kCellGroups;
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
  }

  template <typename Tile>
  __device__ void store(Tile& tile) const {
    const int cell = int(threadIdx.x) % kCellGroups * 4, group = int(threadIdx.x) / kCellGroups;
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) tile[group + kPrototypeGroups * i][cell + j] = sums[i][j];
    }
  }
};

// The same on tensor cores, which multiply halves exactly: a warp takes 16 prototypes and all cells.
struct HalfProducts {
  float sums[kCells / 8][4] = {};

  __device__ void add(const Stage<Half>& stage) {
    const int lane = int(threadIdx.x) % 32, first_prototype = int(threadIdx.x) / 32 * 16;
#pragma unroll
    for (int depth = 0; depth < kDepth; depth += 16) {
      uint32_t p[4];
      load_matrices<false>(p, &stage.prototypes[first_prototype + lane % 16][depth + lane / 16 * 8]);
#pragma unroll
      for (int cell = 0; cell < kCells; cell += 16) {
        uint32_t z[4];
        load_matrices<true>(z, &stage.z[depth + lane % 16][cell + lane / 16 * 8]);
        multiply_add(sums[cell / 8], p, z[0], z[1]);
        multiply_add(sums[cell / 8 + 1], p, z[2], z[3]);
      }
    }
  }

  template <typename Tile>
  __device__ void store(Tile& tile) const {
    const int lane = int(threadIdx.x) % 32, first_prototype = int(threadIdx.x) / 32 * 16;
    for (int i = 0; i < kCells / 8; ++i) {
      for (int j = 0; j < 4; ++j) {
        tile[first_prototype + lane / 4 + j / 2 * 8][8 * i + 2 * (lane % 4) + j % 2] = sums[i][j];
      }
    }
  }
};

// What a tile leaves for its summary, and the summaries of the shares.
struct Scratch {
  float distances[kPrototypes][kCells + 1];  // first the products
  float prototype_norms[2][kPrototypes];
  float cell_norms[kShares][kCells];
  float along[kShares][kCells];
  ClassSummary shares[kShares][kClasses][kCells];
};

// Grid: tiles of cells, splits of the prototypes, images.
template <typename Element>
__global__ void __launch_bounds__(kThreads, 4) summarise(Problem<Element> problem) {
  using Products = std::conditional_t<std::is_same<Element, float>::value, SingleProducts, HalfProducts>;
  using Stages = Stage<Element>[2];
  MELIAD_SHARED(Stages, stages);
  MELIAD_SHARED(Scratch, scratch);
  const int thread = int(threadIdx.x), own_cell = thread % kCells, share = thread / kCells;
  const int64_t depth = problem.batch.depth, cells = problem.batch.cells, image = blockIdx.z;
  const int64_t first_cell = int64_t(blockIdx.x) * kCells;
  const Element* z = problem.batch.z + image * depth * cells;
  const int64_t normal_tiles = tiles(problem.count[kNormal], kPrototypes);
  const int64_t all_tiles = normal_tiles + tiles(problem.count[kAnomaly], kPrototypes);
  const int64_t first_tile = all_tiles * blockIdx.y / kSplits, end_tile = all_tiles * (blockIdx.y + 1) / kSplits;

  ClassSummary normal = {INFINITY, 0, 0}, anomaly = normal;
  float cell_norm = 0, along = 0;  // over a share of the channels
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const Class side = tile < normal_tiles ? kNormal : kAnomaly;
    const Element* prototypes = problem.prototypes + (side == kNormal ? 0 : problem.count[kNormal] * depth);
    const int64_t first = (side == kNormal ? tile : tile - normal_tiles) * kPrototypes;  // within the class
    const auto load = [&](int64_t first_channel, Stage<Element>& stage) {
      load_tile<kDepth, kCells>(stage.z, z, depth, cells, first_channel, first_cell, problem.aligned);
      load_tile<kPrototypes, kDepth>(stage.prototypes, prototypes, problem.count[side], depth, first, first_channel,
                                     problem.aligned);
      commit_copies();
    };

    Products products;
    float prototype_norm = 0;
    load(0, stages[0]);
    int current = 0;
    for (int64_t channel = 0; channel < depth; channel += kDepth) {
      if (channel + kDepth < depth) {
        load(channel + kDepth, stages[1 - current]);
        wait_for_copies<1>();
      } else {
        wait_for_copies<0>();
      }
      __syncthreads();
      const Stage<Element>& stage = stages[current];
      products.add(stage);
      if (tile == first_tile) {  // the same for all tiles
        for (int i = share; i < kDepth; i += kShares) {
          const float value = float(stage.z[i][own_cell]);
          cell_norm += value * value;
          if (channel + i < depth) along += value * problem.batch.direction[channel + i];
        }
      }
      for (int i = thread / kPrototypes; i < kDepth; i += 2) {
        const float value = float(stage.prototypes[thread % kPrototypes][i]);
        prototype_norm += value * value;
      }
      __syncthreads();  // the stage is filled again in the next round but one
      current = 1 - current;
    }

    products.store(scratch.distances);
    if (tile == first_tile) scratch.cell_norms[share][own_cell] = cell_norm;
    scratch.prototype_norms[thread / kPrototypes][thread % kPrototypes] = prototype_norm;
    __syncthreads();
    float squared_norm = 0;
    for (int i = 0; i < kShares; ++i) squared_norm += scratch.cell_norms[i][own_cell];
    ClassSummary of_tile = {INFINITY, 0, 0};
    const int begin = share * (kPrototypes / kShares);
    const int end = min(begin + kPrototypes / kShares, int(min(problem.count[side] - first, int64_t{kPrototypes})));
    for (int k = begin; k < end; ++k) {
      const float norms = squared_norm + (scratch.prototype_norms[0][k] + scratch.prototype_norms[1][k]);
      const float squared = norms - 2 * scratch.distances[k][own_cell];
      const float distance = sqrtf(squared < 0 ? 0 : squared);                      // NaN is not less than 0 and stays
      if (distance < of_tile.minimum) of_tile = {distance, 0, int32_t(first + k)};  // the lowest index wins a tie
      scratch.distances[k][own_cell] = distance;
    }
    for (int k = begin; k < end; ++k) {
      const float distance = scratch.distances[k][own_cell];
      if (distance != INFINITY) of_tile.total += exp2f((of_tile.minimum - distance) * problem.log2e_over_softness);
    }
    if (side == kNormal) {
      normal = join(normal, of_tile, problem.log2e_over_softness);
    } else {
      anomaly = join(anomaly, of_tile, problem.log2e_over_softness);
    }
  }

  scratch.shares[share][kNormal][own_cell] = normal;
  scratch.shares[share][kAnomaly][own_cell] = anomaly;
  scratch.along[share][own_cell] = along;
  __syncthreads();
  const int64_t cell = first_cell + own_cell;
  if (cell >= cells) return;
  if (share < kClasses) {
    ClassSummary all = scratch.shares[0][share][own_cell];
    for (int i = 1; i < kShares; ++i) {
      all = join(all, scratch.shares[i][share][own_cell], problem.log2e_over_softness);
    }
    problem.summaries[((image * kSplits + blockIdx.y) * kClasses + share) * cells + cell] = all;
  } else if (share == kClasses && end_tile == all_tiles) {  // the last split always has a tile
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

// Grid: tiles of cells, images.
template <typename Element>
__global__ void __launch_bounds__(kJoinThreads) join_splits(Problem<Element> problem) {
  const int64_t cells = problem.batch.cells, image = blockIdx.y;
  const int64_t cell = int64_t(blockIdx.x) * kJoinThreads + threadIdx.x;
  if (cell >= cells) return;
  ClassSummary all[kClasses] = {{INFINITY, 0, 0}, {INFINITY, 0, 0}};
  for (int split = 0; split < kSplits; ++split) {
    for (int side = 0; side < kClasses; ++side) {
      const ClassSummary& part = problem.summaries[((image * kSplits + split) * kClasses + side) * cells + cell];
      all[side] = join(all[side], part, problem.log2e_over_softness);
    }
  }
  problem.batch.map[image * cells + cell] =
      evidence(problem.parameters, all[kNormal], all[kAnomaly], problem.along[image * cells + cell]);
  problem.batch.nearest[(2 * image + kNormal) * cells + cell] = all[kNormal].nearest;
  problem.batch.nearest[(2 * image + kAnomaly) * cells + cell] = problem.count[kNormal] + all[kAnomaly].nearest;
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

struct TopScratch {
  int counts[kTopThreads];  // cells per digit, then cells of that digit or a higher one
  double sums[kTopThreads];
  uint32_t prefix;
  int wanted;
  int undefined;
};

// Grid: images. Finds the value of rank top_cells, eight bits at a time, then adds what lies above it.
__global__ void __launch_bounds__(kTopThreads)
    average_top_cells(const float* maps, float* scores, int64_t cells, int64_t top_cells, float offset) {
  MELIAD_SHARED(TopScratch, scratch);
  const int thread = int(threadIdx.x);
  const float* map = maps + int64_t(blockIdx.x) * cells;
  if (thread == 0) {
    scratch.prefix = 0;
    scratch.wanted = int(top_cells);
    scratch.undefined = 0;
  }
  for (int shift = 24; shift >= 0; shift -= 8) {
    scratch.counts[thread] = 0;
    __syncthreads();
    const uint32_t prefix = scratch.prefix;
    for (int64_t i = thread; i < cells; i += kTopThreads) {
      const float value = map[i];
      const uint32_t key = sortable(value);
      if (shift == 24 && isnan(value)) atomicAdd(&scratch.undefined, 1);
      if (shift == 24 || key >> (shift + 8) == prefix >> (shift + 8)) atomicAdd(&scratch.counts[key >> shift & 255], 1);
    }
    __syncthreads();
    for (int step = 1; step < kTopThreads; step *= 2) {
      const int above = thread + step < kTopThreads ? scratch.counts[thread + step] : 0;
      __syncthreads();
      scratch.counts[thread] += above;
      __syncthreads();
    }
    const int wanted = scratch.wanted, higher = thread + 1 < kTopThreads ? scratch.counts[thread + 1] : 0;
    __syncthreads();
    if (higher < wanted && wanted <= scratch.counts[thread]) {  // true for one thread
      scratch.prefix = prefix | uint32_t(thread) << shift;
      scratch.wanted = wanted - higher;
    }
    __syncthreads();
  }
  const uint32_t lowest = scratch.prefix;
  double sum = 0;
  for (int64_t i = thread; i < cells; i += kTopThreads) {
    if (sortable(map[i]) > lowest) sum += map[i];
  }
  scratch.sums[thread] = sum;
  for (int step = kTopThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (thread < step) scratch.sums[thread] += scratch.sums[thread + step];
  }
  if (thread == 0) {
    const double total =
        scratch.sums[0] + scratch.wanted * double(from_sortable(lowest));  // ties count as often as needed
    scores[blockIdx.x] = scratch.undefined ? NAN : float(total / double(top_cells) + offset);
  }
}

size_t rounded_to_16(size_t bytes) { return (bytes + 15) / 16 * 16; }

size_t summary_bytes(int64_t images, int64_t cells) {
  return rounded_to_16(size_t(images) * kSplits * kClasses * size_t(cells) * sizeof(ClassSummary));
}

}  // namespace

size_t workspace_bytes(int64_t images, int64_t cells) {
  return summary_bytes(images, cells) + rounded_to_16(size_t(images) * size_t(cells) * sizeof(float));
}

template <typename Element>
cudaError_t score_patches(const PatchEntropyParameters& parameters, const Element* prototypes, int64_t count,
                          const PatchEntropyBatchOf<Element>& batch, void* workspace, cudaStream_t stream) {
  constexpr int64_t kMostImages = 65535;  // in the third dimension of a grid
  const bool fits = batch.images > 0 && batch.images <= kMostImages && batch.depth > 0 && batch.cells > 0 &&
                    batch.cells <= INT32_MAX && count <= INT32_MAX && parameters.n_normal >= 1 &&
                    parameters.n_normal < count && parameters.top_cells >= 1 && parameters.top_cells <= batch.cells;
  if (!fits) return cudaErrorInvalidValue;

  constexpr int64_t kVector = 16 / sizeof(Element);
  Problem<Element> problem;
  problem.batch = batch;
  problem.prototypes = prototypes;
  problem.count[kNormal] = parameters.n_normal;
  problem.count[kAnomaly] = count - parameters.n_normal;
  problem.parameters = parameters;
  problem.log2e_over_softness = float(1 / (std::log(2.0) * parameters.softness));
  problem.aligned = batch.depth % kVector == 0 && batch.cells % kVector == 0 &&
                    reinterpret_cast<uintptr_t>(batch.z) % 16 == 0 && reinterpret_cast<uintptr_t>(prototypes) % 16 == 0;
  problem.summaries = static_cast<ClassSummary*>(workspace);
  problem.along = reinterpret_cast<float*>(static_cast<char*>(workspace) + summary_bytes(batch.images, batch.cells));

  const auto images = unsigned(batch.images);
  cudaError_t error = launch(summarise<Element>, dim3(unsigned(tiles(batch.cells, kCells)), kSplits, images), kThreads,
                             stream, problem);
  if (error != cudaSuccess) return error;
  error = launch(join_splits<Element>, dim3(unsigned(tiles(batch.cells, kJoinThreads)), images), kJoinThreads, stream,
                 problem);
  if (error != cudaSuccess) return error;
  return launch(average_top_cells, dim3(images), kTopThreads, stream, batch.map, batch.score, batch.cells,
                parameters.top_cells, parameters.offset);
}

template cudaError_t score_patches(const PatchEntropyParameters&, const float*, int64_t,
                                   const PatchEntropyBatchOf<float>&, void*, cudaStream_t);
template cudaError_t score_patches(const PatchEntropyParameters&, const Half*, int64_t,
                                   const PatchEntropyBatchOf<Half>&, void*, cudaStream_t);

}  // namespace meliad::cuda
