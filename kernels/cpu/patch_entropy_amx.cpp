#include "patch_entropy_amx.hpp"

#ifdef __x86_64__

#ifndef __clang__
// GCC warns, wherever they are used, of registers that its own header leaves undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#define MELIAD_TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,fma,amx-tile,amx-bf16")))

namespace meliad::cpu::amx {
namespace {

constexpr int kLanes = 16;
constexpr int kTileRows = 16,
              kTileDepth = 32;  // a tile is 16 prototypes of 32 channels, or 16 pairs of channels of 16 cells
constexpr int kTileValues = kTileRows * kTileDepth;
constexpr double kLog2 = 0.6931471805599453;
// Up to this share of prototypes within reach of the nearest one, settling costs less than exact products of all.
constexpr double kLargestShare = 0.1;

int64_t chunks(int64_t depth) { return (depth + kTileDepth - 1) / kTileDepth; }

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even; values are finite
}

float from_bfloat16(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

float squared_distance(const float* a, const float* b, int64_t depth) {
  float sums[kLanes] = {};
  for (int64_t i = 0; i < depth; ++i) sums[i % kLanes] += (a[i] - b[i]) * (a[i] - b[i]);
  float total = 0;
  for (const float sum : sums) total += sum;
  return total;
}

// The coarse product of z and p is off by at most |z - z~| |p| + |z~| |p - p~|, where ~ marks what is left after
// rounding to 8 bits, and by the additions in single precision; tiles also take tiny values for 0.
float error_of_additions(int64_t depth) { return float(depth) * 0x1p-23f; }       // of |z| |p|
float error_of_tiny_values(int64_t depth) { return float(depth) * 4 * FLT_MIN; }  // absolute
// The norms of a cell and a prototype are the same floats in every distance, so only their sum is rounded here.
constexpr float kErrorOfSum = 0x1p-20f;
// What rounding may add to a length that was computed in single precision, and the difference between |z| and |z~|.
constexpr float kLengthMargin = 1.01f;

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Configuration) == 64);

// The embeddings of a tile: exact and contiguous per cell, and coarse in the order of the tiles.
struct Embeddings {
  float* columns;    // [kCells][stride]
  int64_t stride;    // depth padded to full registers
  uint16_t* coarse;  // [chunks][2 halves of the cells][16 pairs of channels][16 cells][2]
};

Embeddings embeddings_in(float* scratch, int64_t depth) {
  const int64_t stride = chunks(depth) * kTileDepth;
  return {scratch, stride, reinterpret_cast<uint16_t*>(scratch + kCells * stride)};
}

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

struct CellNorms {
  alignas(64) float squared_norm[kCells];
  alignas(64) float rounding[kCells];  // |z - z~|^2
};

MELIAD_TARGET void pack_cells(const TileInput& input, const Embeddings& embeddings, CellNorms& norms, float* along) {
  for (int half = 0; half < 2; ++half) {
    const int64_t left = std::clamp<int64_t>(input.valid - half * kLanes, 0, kLanes);
    const auto valid = __mmask16((1u << left) - 1);
    __m512 squared_sum = _mm512_setzero_ps(), along_sum = squared_sum, rounding_sum = squared_sum;
    for (int64_t first = 0; first < embeddings.stride; first += kLanes) {
      __m512 rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = _mm512_setzero_ps();
        if (first + i >= input.depth) continue;
        rows[i] = _mm512_maskz_loadu_ps(valid, input.z + (first + i) * input.row_stride + half * kLanes);
        squared_sum = _mm512_fmadd_ps(rows[i], rows[i], squared_sum);
        along_sum = _mm512_fmadd_ps(rows[i], _mm512_set1_ps(input.direction[first + i]), along_sum);
      }
      uint16_t* tile = embeddings.coarse + (first / kTileDepth * 2 + half) * kTileValues + first % kTileDepth * kLanes;
      for (int i = 0; i < kLanes; i += 2) {
        const auto even = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(rows[i])));
        const auto odd = _mm512_slli_epi32(_mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(rows[i + 1]))), 16);
        _mm512_storeu_si512(tile + i * kLanes, _mm512_or_si512(even, odd));
        const auto even_rounding = _mm512_sub_ps(rows[i], _mm512_castsi512_ps(_mm512_slli_epi32(even, 16)));
        const auto odd_rounding = _mm512_sub_ps(rows[i + 1], _mm512_castsi512_ps(odd));
        rounding_sum = _mm512_fmadd_ps(even_rounding, even_rounding, rounding_sum);
        rounding_sum = _mm512_fmadd_ps(odd_rounding, odd_rounding, rounding_sum);
      }
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) {
        _mm512_storeu_ps(embeddings.columns + (half * kLanes + i) * embeddings.stride + first, rows[i]);
      }
    }
    _mm512_store_ps(norms.squared_norm + half * kLanes, squared_sum);
    _mm512_store_ps(norms.rounding + half * kLanes, rounding_sum);
    _mm512_storeu_ps(along + half * kLanes, along_sum);
  }
}

// dot[k][cell] of one panel, coarsely.
MELIAD_TARGET inline void multiply(const uint16_t* panel, const uint16_t* cells, int64_t chunk_count,
                                   float (&dot)[kPrototypes][kCells]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t chunk = 0; chunk < chunk_count; ++chunk) {
    _tile_loadd(4, panel + chunk * 2 * kTileValues, 64);
    _tile_loadd(5, panel + chunk * 2 * kTileValues + kTileValues, 64);
    _tile_loadd(6, cells + chunk * 2 * kTileValues, 64);
    _tile_loadd(7, cells + chunk * 2 * kTileValues + kTileValues, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  constexpr int kRowBytes = kCells * sizeof(float);
  _tile_stored(0, dot[0], kRowBytes);
  _tile_stored(1, dot[0] + kLanes, kRowBytes);
  _tile_stored(2, dot[kTileRows], kRowBytes);
  _tile_stored(3, dot[kTileRows] + kLanes, kRowBytes);
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
    const int64_t chunk_count = chunks(input_.depth);
    for (int64_t first = 0; first < prototypes_.count; first += kPrototypes) {
      alignas(64) float squared[kPrototypes][kCells];  // first the products, then lower bounds
      multiply(prototypes_.coarse.data() + first * chunk_count * kTileDepth, embeddings_.coarse, chunk_count, squared);
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
      const __m512 per_length = _mm512_fmadd_ps(length, _mm512_set1_ps(error_of_additions(input_.depth)), rounding);
      __m512 bound = _mm512_set1_ps(INFINITY);  // one distance is at most that
      for (int k = 0; k < count; ++k) {
        const size_t index = size_t(first + k);
        const __m512 norms = _mm512_add_ps(norm, _mm512_set1_ps(prototypes_.squared_norms[index]));
        __m512 error = _mm512_fmadd_ps(norms, error_of_sum, tiny);
        error = _mm512_fmadd_ps(per_length, _mm512_set1_ps(prototypes_.lengths[index]), error);
        error = _mm512_fmadd_ps(length, _mm512_set1_ps(prototypes_.rounding_lengths[index]), error);
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

}  // namespace

bool supported() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  if (eax < 7) return false;
  eax = 7, ecx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  const bool has_tiles = (edx >> 22 & 1) && (edx >> 24 & 1);  // AMX-BF16, AMX-TILE
  eax = 7, ecx = 1;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return has_tiles && (eax >> 5 & 1);  // AVX512_BF16
}

bool permitted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

namespace {

// Distance beyond the minimum from which on prototypes are left out: all of them together add less than a rounding to a
// sum that is at least 1.
float reach(int64_t count, float softness) { return float(softness * (25 * kLog2 + std::log(double(count)))); }

}  // namespace

bool pays(const float* rows, int64_t count, int64_t depth, float softness) {
  if (!std::all_of(rows, rows + count * depth, [](float value) { return std::fabs(value) < 1e15f; })) return false;
  const float beyond = reach(count, softness);
  constexpr int64_t kSamples = 8;
  std::vector<float> distances;
  double within = 0;
  int64_t samples = 0;
  for (int64_t i = 0; i < count; i += std::max<int64_t>(1, count / kSamples), ++samples) {
    distances.clear();
    for (int64_t k = 0; k < count; ++k) {
      if (k != i) distances.push_back(std::sqrt(squared_distance(rows + i * depth, rows + k * depth, depth)));
    }
    if (distances.empty()) return true;
    const float nearest = *std::min_element(distances.begin(), distances.end());
    within += double(std::count_if(distances.begin(), distances.end(),
                                   [&](float distance) { return distance <= nearest + beyond; }));
  }
  return within <= kLargestShare * double(count * samples) + 2 * double(samples);
}

void pack(const float* rows, int64_t count, int64_t depth, float softness, PackedClass& packed) {
  const int64_t chunk_count = chunks(depth), panels = (count + kPrototypes - 1) / kPrototypes;
  packed.reach = reach(count, softness);
  packed.rows.assign(rows, rows + count * depth);
  packed.coarse.assign(size_t(panels * chunk_count * 2 * kTileValues), 0);
  for (int64_t k = 0; k < count; ++k) {
    double rounding = 0;
    for (int64_t i = 0; i < depth; ++i) {
      const float value = rows[k * depth + i];
      const uint16_t coarse = to_bfloat16(value);
      const int64_t tile = (k / kPrototypes * chunk_count + i / kTileDepth) * 2 + k % kPrototypes / kTileRows;
      packed.coarse[size_t(tile * kTileValues + k % kTileRows * kTileDepth + i % kTileDepth)] = coarse;
      rounding += (double(value) - from_bfloat16(coarse)) * (double(value) - from_bfloat16(coarse));
    }
    packed.lengths.push_back(std::sqrt(packed.squared_norms[size_t(k)]));
    packed.rounding_lengths.push_back(float(std::sqrt(rounding)));
  }
}

int64_t scratch_size(int64_t depth) {
  const int64_t stride = chunks(depth) * kTileDepth;
  return kCells * stride + kCells * stride / 2;
}

MELIAD_TARGET void score_tile(const TileInput& input, TileSummary& summary) {
  const Configuration configuration;
  _tile_loadconfig(&configuration);
  const Embeddings embeddings = embeddings_in(input.scratch, input.depth);
  CellNorms norms;
  pack_cells(input, embeddings, norms, summary.along);
  ClassPass(input, embeddings, norms, *input.normal, summary.normal).run();
  ClassPass(input, embeddings, norms, *input.anomaly, summary.anomaly).run();
  _tile_release();
}

}  // namespace meliad::cpu::amx

#endif
