// The CPU kernel on processors with matrix tiles (Intel AMX): screen in bfloat16, settle in single precision.
//
// The soft minimum hardly sees a prototype that is farther than the nearest one by many times the softness. So the
// tiles compute all products coarsely, 16 times as fast as vectors do exactly, and a bound on what the coarseness can
// hide leaves a few prototypes per cell, whose distances are then computed exactly. Nothing that could change a result
// by a rounding is left out.
#pragma once

#include <cstdint>

#include "patch_entropy_tile.hpp"

namespace meliad::cpu::amx {

constexpr int kCells = 32, kPrototypes = 32;

// Whether this processor has the tiles.
bool supported();

// Whether the operating system lets this process use them. The first call asks it, which is not free for the process:
// afterwards alternative signal stacks must hold the tiles, too, and where a thread has a smaller one it refuses.
bool permitted();

// Whether few enough prototypes would be left: the softness is small against the distances between them, which are
// finite. Rows are [count, depth].
bool pays(const float* rows, int64_t count, int64_t depth, float softness);

// Fills what the tiles need of a class whose squared norms are known; rows are [count, depth].
void pack(const float* rows, int64_t count, int64_t depth, float softness, PackedClass& packed);

// Floats of scratch memory for a tile.
int64_t scratch_size(int64_t depth);

void score_tile(const TileInput& input, TileSummary& summary);

}  // namespace meliad::cpu::amx
