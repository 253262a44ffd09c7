// The CPU kernel on processors with matrix tiles (Intel AMX): screen in bfloat16, settle in single precision.
//
// The soft minimum hardly sees a prototype that is farther than the nearest one by many times the softness. So the
// tiles compute all products coarsely, 16 times as fast as vectors do exactly, and a bound on what the coarseness can
// hide leaves a few prototypes per cell, whose distances are then computed exactly. Nothing that could change a result
// by a rounding is left out.
#pragma once

#include <cstdint>
#include <vector>

#include "patch_entropy_tile.hpp"

namespace meliad::cpu::amx {

constexpr int kCells = 32, kPrototypes = 32;

// Whether this processor has the tiles and the operating system lets this process use them; asks it the first time.
bool available();

// Whether few enough prototypes would be left: the softness is small against the distances between them, which are
// finite. Rows are [count, depth].
bool pays(const float* rows, int64_t count, int64_t depth, float softness);

// Distance beyond the minimum from which on prototypes are left out.
float reach(int64_t count, float softness);

// Values of one class in the order in which the tiles read them, padded with zeros; rows are [count, depth].
std::vector<uint16_t> pack(const float* rows, int64_t count, int64_t depth);

// Floats of scratch memory for a tile.
int64_t scratch_size(int64_t depth);

void score_tile(const TileInput& input, TileSummary& summary);

}  // namespace meliad::cpu::amx
