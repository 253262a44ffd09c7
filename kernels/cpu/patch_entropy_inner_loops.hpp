// The inner loops of the CPU kernel. patch_entropy.cpp includes this file once per instruction set, hence no include
// guard: each time in another namespace that defines kLanes and kPrototypes, with MELIAD_TARGET as the attribute that
// compiles a function for that instruction set. Nothing here may call a function that is not inlined.

#define MELIAD_INLINE MELIAD_TARGET __attribute__((always_inline)) inline

// kLanes floats per register; a tile is 2 registers of cells times kPrototypes prototypes, so that its sums, one row
// of z and one prototype value fill the register file and every loaded value is used 2 or kPrototypes times.
constexpr int kCells = 2 * kLanes;
static_assert(kCells <= kMaxCells);
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef Vector UnalignedVector __attribute__((aligned(sizeof(float)), may_alias));

// One instruction each; copies with memcpy may go through smaller registers and stall.
MELIAD_INLINE Vector load(const float* values) { return *reinterpret_cast<const UnalignedVector*>(values); }
MELIAD_INLINE void store(float* values, Vector vector) { *reinterpret_cast<UnalignedVector*>(values) = vector; }

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

// Copies the cells into rows of kCells, and computes |z|^2 and direction . z on the way.
MELIAD_INLINE void pack(const TileInput& input, float* squared_norm, float* along) {
  Vector squared_sum[2] = {}, along_sum[2] = {};
  for (int64_t i = 0; i < input.depth; ++i) {
    const float* source = input.z + i * input.row_stride;
    float padded[kCells] = {};
    if (input.valid < kCells) {
      for (int64_t cell = 0; cell < input.valid; ++cell) padded[cell] = source[cell];
      source = padded;
    }
    for (int half = 0; half < 2; ++half) {
      const Vector row = load(source + half * kLanes);
      squared_sum[half] += row * row;
      along_sum[half] += row * input.direction[i];
      store(input.scratch + i * kCells + half * kLanes, row);
    }
  }
  for (int half = 0; half < 2; ++half) {
    store(squared_norm + half * kLanes, squared_sum[half]);
    store(along + half * kLanes, along_sum[half]);
  }
}

// dot[k][cell] = panel[:, k] . z[:, cell]
MELIAD_INLINE void multiply(const float* packed_z, const float* panel, int64_t depth,
                            float (&dot)[kPrototypes][kCells]) {
  Vector sum[kPrototypes][2] = {};
  for (int64_t i = 0; i < depth; ++i) {
    const Vector first = load(packed_z + i * kCells), second = load(packed_z + i * kCells + kLanes);
#pragma GCC unroll 16
    for (int k = 0; k < kPrototypes; ++k) {
      const float value = panel[i * kPrototypes + k];
      sum[k][0] += first * value;
      sum[k][1] += second * value;
    }
  }
  for (int k = 0; k < kPrototypes; ++k) {
    store(dot[k], sum[k][0]);
    store(dot[k] + kLanes, sum[k][1]);
  }
}

// One pass over the panels of a class; the matrix of distances never exists beyond one panel.
MELIAD_INLINE void summarise(const TileInput& input, const float* squared_norm, const PackedClass& prototypes,
                             ClassSummary& summary) {
  for (int cell = 0; cell < kCells; ++cell) {
    summary.minimum[cell] = __builtin_inff();
    summary.total[cell] = 0;
    summary.nearest[cell] = 0;
  }
  for (int64_t panel = 0; panel < prototypes.panel_count; ++panel) {
    alignas(64) float d[kPrototypes][kCells];
    multiply(input.scratch, prototypes.panels.data() + panel * input.depth * kPrototypes, input.depth, d);

    float previous[kCells];
    std::memcpy(previous, summary.minimum, sizeof previous);
    for (int k = 0; k < kPrototypes; ++k) {
      const float prototype_norm = prototypes.squared_norms.data()[panel * kPrototypes + k];
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

MELIAD_TARGET void score_tile(const TileInput& input, TileSummary& summary) {
  alignas(64) float squared_norm[kCells];
  pack(input, squared_norm, summary.along);
  summarise(input, squared_norm, *input.normal, summary.normal);
  summarise(input, squared_norm, *input.anomaly, summary.anomaly);
}

#undef MELIAD_INLINE
