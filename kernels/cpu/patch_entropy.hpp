// PatchEntropyScore on the CPU: single precision, SIMD, no allocation per run once every thread has run once.
#pragma once

#include <cstdint>

#include "../patch_entropy.hpp"
#include "instruction_set.hpp"
#include "patch_entropy_tile.hpp"

namespace meliad::cpu {

// Scores batches against one set of prototypes, which it keeps in the order in which the inner loop reads them.
//
// A run is score_tile for every tile of the batch, on any threads in any order, then score_images. Results do not
// depend on the number of threads, on the order, or on what else is in the batch.
class PatchEntropyScorer {
 public:
  // prototypes is [count, depth] and is copied. Throws std::invalid_argument when the parameters do not fit it. kVnni
  // and kAmx become kAvx512 for prototypes and a softness that it would be slower with, kAmx also where the system does
  // not lend it.
  PatchEntropyScorer(const PatchEntropyParameters& parameters, const float* prototypes, int64_t count, int64_t depth,
                     InstructionSet instruction_set = best_instruction_set());

  int64_t depth() const { return depth_; }
  InstructionSet instruction_set() const { return instruction_set_; }
  int64_t tile_count(const PatchEntropyBatch& batch) const { return batch.images * tiles_per_image(batch); }

  // Writes map and nearest of one tile of cells. Throws std::bad_alloc.
  void score_tile(const PatchEntropyBatch& batch, int64_t tile) const;

  // Writes score from the finished map. Needs top_cells <= batch.cells. Throws std::bad_alloc.
  void score_images(const PatchEntropyBatch& batch) const;

 private:
  PackedClass pack(const float* prototypes, int64_t count) const;
  int64_t tiles_per_image(const PatchEntropyBatch& batch) const;
  int64_t scratch_size() const;

  PatchEntropyParameters parameters_;
  int64_t depth_;
  InstructionSet instruction_set_;
  PackedClass normal_, anomaly_;
};

}  // namespace meliad::cpu
