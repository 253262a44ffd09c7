// The inner loops of the CPU kernel, written once and compiled once per instruction set (see patch_entropy.cpp).
// Nothing here may call a function that is not inlined: it would be compiled for the wrong instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace meliad::cpu {

#define MELIAD_INLINE __attribute__((always_inline)) inline

// Prototypes of one class in panels [panel][depth][kPrototypes]; the last panel is padded with prototypes at
// infinite distance, which no minimum picks and which add nothing to a soft minimum.
struct PackedClass {
  const float* panels;
  const float* squared_norms;  // [panels][kPrototypes]
  int64_t panel_count;
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

// 2^x for x <= 0, relative error below 2e-7; NaN stays NaN. Below the normal range it stops at 2^-126, not at 0.
MELIAD_INLINE float exp2_negative(float x) {
  x = x < -126.0f ? -126.0f : x;
  const float shifted = x + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer in the low mantissa bits
  const float fraction = x - (shifted - 12582912.0f);  // [-0.5, 0.5]
  float power = 1.535336188e-4f;  // minimax polynomial of 2^fraction, coefficients of Cephes exp2f (Moshier)
  power = power * fraction + 1.339887440e-3f;
  power = power * fraction + 9.618437357e-3f;
  power = power * fraction + 5.550332471e-2f;
  power = power * fraction + 2.402264791e-1f;
  power = power * fraction + 6.931472028e-1f;
  power = power * fraction + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return power * scale;
}

// kLanes floats per register; a tile is 2 registers of cells times kPrototypes prototypes, so that its sums, one row
// of z and one prototype value fill the register file and every loaded value is used 2 or kPrototypes times.
template <int kLanes, int kPrototypes>
struct Tile {
  static constexpr int kCells = 2 * kLanes;
  static_assert(kCells <= kMaxCells);
  typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

  static MELIAD_INLINE void run(const TileInput& input, TileSummary& summary) {
    alignas(64) float squared_norm[kCells];
    pack(input, squared_norm, summary.along);
    summarise(input, squared_norm, *input.normal, summary.normal);
    summarise(input, squared_norm, *input.anomaly, summary.anomaly);
  }

 private:
  // Copies the cells into rows of kCells, and computes |z|^2 and direction . z on the way.
  static MELIAD_INLINE void pack(const TileInput& input, float* squared_norm, float* along) {
    Vector squared_sum[2] = {}, along_sum[2] = {};
    for (int64_t i = 0; i < input.depth; ++i) {
      const float* source = input.z + i * input.row_stride;
      Vector row[2];
      if (input.valid == kCells) {
        std::memcpy(row, source, sizeof row);
      } else {
        float padded[kCells] = {};
        for (int64_t cell = 0; cell < input.valid; ++cell) padded[cell] = source[cell];
        std::memcpy(row, padded, sizeof row);
      }
      for (int half = 0; half < 2; ++half) {
        squared_sum[half] += row[half] * row[half];
        along_sum[half] += row[half] * input.direction[i];
      }
      std::memcpy(input.scratch + i * kCells, row, sizeof row);
    }
    std::memcpy(squared_norm, squared_sum, sizeof squared_sum);
    std::memcpy(along, along_sum, sizeof along_sum);
  }

  // dot[k][cell] = panel[:, k] . z[:, cell]
  static MELIAD_INLINE void multiply(const float* packed_z, const float* panel, int64_t depth,
                                     float (&dot)[kPrototypes][kCells]) {
    Vector sum[kPrototypes][2] = {};
    for (int64_t i = 0; i < depth; ++i) {
      Vector row[2];
      std::memcpy(row, packed_z + i * kCells, sizeof row);
#pragma GCC unroll 16
      for (int k = 0; k < kPrototypes; ++k) {
        const float value = panel[i * kPrototypes + k];
        sum[k][0] += row[0] * value;
        sum[k][1] += row[1] * value;
      }
    }
    std::memcpy(dot, sum, sizeof sum);
  }

  // One pass over the panels of a class; the matrix of distances never exists beyond one panel.
  static MELIAD_INLINE void summarise(const TileInput& input, const float* squared_norm, const PackedClass& prototypes,
                                      ClassSummary& summary) {
    for (int cell = 0; cell < kCells; ++cell) {
      summary.minimum[cell] = __builtin_inff();
      summary.total[cell] = 0;
      summary.nearest[cell] = 0;
    }
    for (int64_t panel = 0; panel < prototypes.panel_count; ++panel) {
      alignas(64) float d[kPrototypes][kCells];
      multiply(input.scratch, prototypes.panels + panel * input.depth * kPrototypes, input.depth, d);

      float previous[kCells];
      std::memcpy(previous, summary.minimum, sizeof previous);
      for (int k = 0; k < kPrototypes; ++k) {
        const float prototype_norm = prototypes.squared_norms[panel * kPrototypes + k];
        const int32_t index = int32_t(panel * kPrototypes + k);
        for (int cell = 0; cell < kCells; ++cell) {
          const float squared = (squared_norm[cell] + prototype_norm) - 2 * d[k][cell];
          const float distance = __builtin_sqrtf(squared < 0 ? 0 : squared);  // NaN is not less than 0 and stays
          const bool closer = distance < summary.minimum[cell];               // strict: the lowest index wins a tie
          summary.minimum[cell] = closer ? distance : summary.minimum[cell];
          summary.nearest[cell] = closer ? index : summary.nearest[cell];
          d[k][cell] = distance;
        }
      }
      float total[kCells] = {};
      for (int k = 0; k < kPrototypes; ++k) {
        for (int cell = 0; cell < kCells; ++cell) {
          total[cell] += exp2_negative((summary.minimum[cell] - d[k][cell]) * input.log2e_over_softness);
        }
      }
      for (int cell = 0; cell < kCells; ++cell) {
        const float shrink = exp2_negative((summary.minimum[cell] - previous[cell]) * input.log2e_over_softness);
        summary.total[cell] = summary.total[cell] * shrink + total[cell];
      }
    }
  }
};

}  // namespace meliad::cpu
