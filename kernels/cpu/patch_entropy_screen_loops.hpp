// Screening: what is left to do around a coarse product. patch_entropy_amx.cpp and patch_entropy_vnni.cpp include this
// file, hence no include guard: each in a namespace that defines kLanes, kCells, kPrototypes, Embeddings, and
// multiply, with MELIAD_TARGET as the attribute that compiles a function for its instruction set, AVX-512 at least.
//
// The coarse product of z and p is off by at most |z - z~| |p| + |z~| |p - p~|, where ~ marks what is left after
// rounding, and by what single precision adds; matrix tiles also take tiny values for 0.

constexpr float error_of_additions(int64_t depth) { return float(depth + 4) * 0x1p-23f; }   // of |z| |p|
constexpr float error_of_tiny_values(int64_t depth) { return float(depth) * 4 * FLT_MIN; }  // absolute
// The norms of a cell and a prototype are the same floats in every distance, so only their sum is rounded here.
constexpr float kErrorOfSum = 0x1p-20f;
// What rounding may add to a length that was computed in single precision.
constexpr float kLengthMargin = 1.01f;

struct CellNorms {
  alignas(64) float squared_norm[kCells];
  alignas(64) float rounding[kCells];  // |z - z~|^2
};

// 16 x 16 floats, rows to columns.
MELIAD_TARGET inline void transpose(__m512 (&rows)[16]) {
  __m512 pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(pairs[i + j]), high = _mm512_castps_pd(pairs[i + j + 2]);
      quads[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      quads[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // quads[4 a + c] holds, in 128-bit lane b, rows 4 a to 4 a + 3 of column 4 b + c.
  for (int c = 0; c < 4; ++c) {
    const __m512 even01 = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0xDD);
    const __m512 even23 = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0xDD);
    rows[c] = _mm512_shuffle_f32x4(even01, even23, 0x88);
    rows[8 + c] = _mm512_shuffle_f32x4(even01, even23, 0xDD);
    rows[4 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    rows[12 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0xDD);
  }
}

MELIAD_TARGET inline float exact_product(const float* a, const float* b, int64_t depth) {
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t i = 0;
  for (; i + 2 * kLanes <= depth; i += 2 * kLanes) {
    sum[0] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sum[0]);
    sum[1] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + kLanes), _mm512_loadu_ps(b + i + kLanes), sum[1]);
  }
  for (; i < depth; i += kLanes) {
    const auto valid = __mmask16((1u << std::min<int64_t>(kLanes, depth - i)) - 1);
    sum[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(valid, a + i), _mm512_maskz_loadu_ps(valid, b + i), sum[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
}

// Prototypes of one class that may matter to a cell, in rising order, until it is known which ones do.
struct Candidates {
  static constexpr int kCapacity = 64;
  int count[kCells] = {};
  int32_t index[kCells][kCapacity];
  float lower_bound[kCells][kCapacity];  // of the squared distance
};

// One pass over the prototypes of a class.
class ClassPass {
 public:
  MELIAD_TARGET ClassPass(const TileInput& input, const Embeddings& embeddings, const CellNorms& norms,
                          const PackedClass& prototypes, ClassSummary& summary)
      : input_(input), embeddings_(embeddings), norms_(norms), prototypes_(prototypes), summary_(summary) {
    std::fill_n(summary.minimum, kCells, INFINITY);
    std::fill_n(summary.total, kCells, 0.0f);
    std::fill_n(summary.nearest, kCells, 0);
    std::fill_n(nearest_, kCells, INFINITY);
  }

  MELIAD_TARGET void run() {
    for (int64_t first = 0; first < prototypes_.count; first += kPrototypes) {
      alignas(64) float squared[kPrototypes][kCells];  // first the products, then lower bounds
      multiply(prototypes_, first, embeddings_, squared);
      collect(first, int(std::min<int64_t>(kPrototypes, prototypes_.count - first)), squared);
    }
    for (int cell = 0; cell < kCells; ++cell) settle(cell);
  }

 private:
  // Bounds the distances of one panel and notes the prototypes that are within reach of the nearest one so far.
  MELIAD_TARGET void collect(int64_t first, int count, float (&squared)[kPrototypes][kCells]) {
    const __m512 reach = _mm512_set1_ps(prototypes_.reach), error_of_sum = _mm512_set1_ps(kErrorOfSum);
    const __m512 tiny = _mm512_set1_ps(error_of_tiny_values(input_.depth));
    __m512 farthest[2];
    for (int half = 0; half < 2; ++half) {
      const __m512 norm = _mm512_load_ps(norms_.squared_norm + half * kLanes);
      const __m512 margin = _mm512_set1_ps(2 * kLengthMargin);  // the product counts twice in a squared distance
      const __m512 length = _mm512_mul_ps(_mm512_sqrt_ps(norm), margin);
      const __m512 rounding = _mm512_mul_ps(_mm512_sqrt_ps(_mm512_load_ps(norms_.rounding + half * kLanes)), margin);
      const __m512 coarse_length = _mm512_add_ps(length, rounding);  // at least that of z~
      const __m512 per_length = _mm512_fmadd_ps(length, _mm512_set1_ps(error_of_additions(input_.depth)), rounding);
      __m512 bound = _mm512_set1_ps(INFINITY);  // one distance is at most that
      for (int k = 0; k < count; ++k) {
        const size_t index = size_t(first + k);
        const __m512 norms = _mm512_add_ps(norm, _mm512_set1_ps(prototypes_.squared_norms[index]));
        __m512 error = _mm512_fmadd_ps(norms, error_of_sum, tiny);
        error = _mm512_fmadd_ps(per_length, _mm512_set1_ps(prototypes_.lengths[index]), error);
        error = _mm512_fmadd_ps(coarse_length, _mm512_set1_ps(prototypes_.rounding_lengths[index]), error);
        float* const products = squared[k] + half * kLanes;
        const __m512 middle = _mm512_fmadd_ps(_mm512_load_ps(products), _mm512_set1_ps(-2.0f), norms);
        bound = _mm512_min_ps(_mm512_add_ps(middle, error), bound);  // stays where there is a NaN
        _mm512_store_ps(products, _mm512_sub_ps(middle, error));
      }
      const __m512 nearest = _mm512_min_ps(_mm512_load_ps(nearest_ + half * kLanes),
                                           _mm512_sqrt_ps(_mm512_max_ps(bound, _mm512_setzero_ps())));
      _mm512_store_ps(nearest_ + half * kLanes, nearest);
      farthest[half] = square_of_sum(nearest, reach);
    }
    for (int k = 0; k < count; ++k) {
      uint32_t cells = _mm512_cmp_ps_mask(_mm512_load_ps(squared[k]), farthest[0], _CMP_LE_OQ) |
                       uint32_t(_mm512_cmp_ps_mask(_mm512_load_ps(squared[k] + kLanes), farthest[1], _CMP_LE_OQ)) << 16;
      for (; cells != 0; cells &= cells - 1) {
        const int cell = __builtin_ctz(cells);
        if (candidates_.count[cell] == Candidates::kCapacity) settle(cell);
        const int number = candidates_.count[cell]++;
        candidates_.index[cell][number] = int32_t(first + k);
        candidates_.lower_bound[cell][number] = squared[k][cell];
      }
    }
  }

  MELIAD_TARGET static __m512 square_of_sum(__m512 a, __m512 b) {
    const __m512 sum = _mm512_add_ps(a, b);
    return _mm512_mul_ps(sum, sum);
  }

  // Adds the candidates of a cell that are within reach of the nearest prototype so far, with their exact distances.
  MELIAD_TARGET void settle(int cell) {
    const float farthest = (nearest_[cell] + prototypes_.reach) * (nearest_[cell] + prototypes_.reach);
    for (int i = 0; i < candidates_.count[cell]; ++i) {
      if (!(candidates_.lower_bound[cell][i] <= farthest)) continue;
      const int32_t index = candidates_.index[cell][i];
      const float product = exact_product(prototypes_.rows.data() + index * input_.depth,
                                          embeddings_.columns + cell * embeddings_.stride, input_.depth);
      const float squared = (norms_.squared_norm[cell] + prototypes_.squared_norms[size_t(index)]) - 2 * product;
      add(cell, std::sqrt(squared < 0 ? 0 : squared), index);
    }
    candidates_.count[cell] = 0;
  }

  void add(int cell, float distance, int32_t index) {
    float &minimum = summary_.minimum[cell], &total = summary_.total[cell];
    const float scale = input_.log2e_over_softness;
    if (distance < minimum) {  // strict: the lowest index wins a tie
      total = total * std::exp2((distance - minimum) * scale) + 1;
      minimum = distance;
      summary_.nearest[cell] = index;
    } else {
      total += std::exp2((minimum - distance) * scale);
    }
  }

  const TileInput& input_;
  const Embeddings& embeddings_;
  const CellNorms& norms_;
  const PackedClass& prototypes_;
  ClassSummary& summary_;
  alignas(64) float nearest_[kCells];  // bound on the distance of the nearest prototype so far
  Candidates candidates_;
};
