// Screening: compute all products coarsely, settle few in single precision.
//
// The soft minimum hardly sees a prototype that is farther than the nearest one by many times the softness. So all
// products are computed coarsely, several times as fast as vectors do exactly, and a bound on what the coarseness can
// hide leaves a few prototypes per cell, whose distances are then computed exactly. Nothing that could change a result
// by a rounding is left out.
#pragma once

#include <cstdint>

namespace meliad::cpu {

// Distance beyond the minimum from which on prototypes are left out: all of them together add less than a rounding to a
// sum that is at least 1.
float screening_reach(int64_t count, float softness);

// Whether few enough prototypes would be left: the softness and the error of products, as a share of the product of the
// lengths, are small against the distances between prototypes, which are finite. Rows are [count, depth].
bool screening_pays(const float* rows, int64_t count, int64_t depth, float softness, float product_error);

}  // namespace meliad::cpu
