// Shapes and parameters of the operator PatchEntropyScore (domain "meliad", version 1), shared by every implementation.
// The equation is spelled out in reference/patch_entropy.py; the symbols in the comments are those of that file.
#pragma once

#include <cstdint>

namespace meliad {

// Attributes of the node.
struct PatchEntropyParameters {
  int64_t n_normal;     // the first rows of the prototypes are normal, the rest anomalous; in [1, K)
  int64_t top_cells;    // cells whose evidence is averaged into the score; in [1, H*W]
  float softness;       // T > 0, in units of distance
  float normal_scale;   // s_n
  float anomaly_scale;  // s_a
  float bias;           // b
  float kappa;          // in [0, 1)
  float offset;         // b0
};

// Inputs and outputs of one run; "cells" is H*W. The caller owns everything.
template <typename Element>
struct PatchEntropyBatchOf {
  int64_t images;          // N
  int64_t depth;           // D
  int64_t cells;           // H*W
  const Element* z;        // [N, D, H*W]
  const float* direction;  // [D]
  float* score;            // [N]
  float* map;              // [N, H*W]
  int64_t* nearest;        // [N, 2, H*W]
};
using PatchEntropyBatch = PatchEntropyBatchOf<float>;

}  // namespace meliad
