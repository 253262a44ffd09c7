// What goes into and comes out of one tile of the CPU kernel, whatever instruction set computes it.
#pragma once

#include <cstdint>

namespace meliad::cpu {

// Prototypes of one class. For vectors they lie in panels [panel][depth][kPrototypes]; the last panel is padded with
// prototypes at infinite distance, which no minimum picks and which add nothing to a soft minimum.
struct PackedClass {
  const float* squared_norms;  // of every prototype, also of the padding
  const float* panels;
  int64_t panel_count;
  // For matrix tiles, see patch_entropy_amx.hpp.
  const float* rows;  // [count][depth]
  const float* lengths;
  const uint16_t* coarse;
  int64_t count;
  float reach;
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
  float* scratch;  // [depth][cells of a tile]
};

}  // namespace meliad::cpu
