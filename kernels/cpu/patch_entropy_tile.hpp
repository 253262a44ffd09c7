// What goes into and comes out of one tile of the CPU kernel, whatever instruction set computes it.
#pragma once

#include <cstdint>
#include <vector>

namespace meliad::cpu {

// Prototypes of one class, in the order in which the inner loops read them.
struct PackedClass {
  int64_t count = 0;
  std::vector<float> squared_norms;

  // For vectors: panels [panel][depth][prototypes of a panel]. The last one is padded with prototypes at infinite
  // distance, which no minimum picks and which add nothing to a soft minimum; squared_norms, too.
  std::vector<float> panels;
  int64_t panel_count = 0;

  // For screening, see patch_entropy_screening.hpp.
  std::vector<float> rows;  // [count][depth]
  std::vector<float> lengths, rounding_lengths;
  float reach = 0;
  std::vector<uint16_t> coarse;  // on matrix tiles: [panel][chunks of depth][tiles]
  std::vector<int8_t> bytes;     // with VNNI: [panel][groups of 4 channels][prototypes of a panel][4]
  std::vector<float> scales;     // of the bytes of each prototype
  std::vector<int32_t> shifts;   // what the zero point of the bytes of cells adds to a product, negated
};

constexpr int kMaxCells = 32;  // cells of the largest tile

// What one pass over the prototypes of a class leaves of the distances of each cell.
struct ClassSummary {
  float minimum[kMaxCells];
  float total[kMaxCells];  // sum over k of exp((minimum - d_k) / T)
  int32_t nearest[kMaxCells];
};

struct TileSummary {
  ClassSummary normal, anomaly;
  float along[kMaxCells];  // direction . z
};

// One tile of cells of one image.
struct TileInput {
  const float* z;      // channel 0 of the first cell
  int64_t row_stride;  // floats between channels
  int64_t depth;
  int64_t valid;           // cells that exist, at most the cells of a tile
  const float* direction;  // [depth]
  const PackedClass* normal;
  const PackedClass* anomaly;
  float log2e_over_softness;
  float* scratch;  // as much as the inner loops of the instruction set need
};

}  // namespace meliad::cpu
