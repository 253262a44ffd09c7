// The CPU kernel on processors that multiply bytes (AVX-512 VNNI): screening in 8 bits, with a scale per cell and per
// prototype, four times as many products per instruction as in single precision; see patch_entropy_screening.hpp.
#pragma once

#include <cstdint>

#include "patch_entropy_tile.hpp"

namespace meliad::cpu::vnni {

constexpr int kCells = 32, kPrototypes = 12;

// Whether screening is worth it; rows are [count, depth].
bool pays(const float* rows, int64_t count, int64_t depth, float softness);

// Fills what screening needs of a class whose squared norms are known; rows are [count, depth].
void pack(const float* rows, int64_t count, int64_t depth, float softness, PackedClass& packed);

// Floats of scratch memory for a tile.
int64_t scratch_size(int64_t depth);

void score_tile(const TileInput& input, TileSummary& summary);

}  // namespace meliad::cpu::vnni
