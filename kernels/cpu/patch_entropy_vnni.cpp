#include "patch_entropy_vnni.hpp"

#ifdef __x86_64__

#ifndef __clang__
// GCC warns, wherever they are used, of registers that its own header leaves undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#include "patch_entropy_screening.hpp"

#define MELIAD_TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512vnni,fma")))

namespace meliad::cpu::vnni {
namespace {

constexpr int kLanes = 16, kGroup = 4;  // channels whose products one instruction adds up
constexpr int kZero = 128;              // of the bytes of cells, which have no sign
constexpr float kLargest = 127;
// Beyond, sums of bytes would not fit into 32 bits.
constexpr int64_t kMostChannels = 65536;
// What rounding takes from both factors about, as a share of the product of their lengths.
constexpr float kProductError = 0.02f;

// The embeddings of a tile: exact and contiguous per cell, and as bytes.
struct Embeddings {
  float* columns;  // [kCells][stride]
  int64_t stride;  // depth padded to full registers
  float* scales;   // [kCells]: of the bytes
  uint8_t* bytes;  // [groups][kCells][kGroup]
};

int64_t padded(int64_t depth) { return (depth + kLanes - 1) / kLanes * kLanes; }

Embeddings embeddings_in(float* scratch, int64_t depth) {
  const int64_t stride = padded(depth);
  float* const scales = scratch + kCells * stride;
  return {scratch, stride, scales, reinterpret_cast<uint8_t*>(scales + kCells)};
}

// Unlike __m512i this may not alias anything else, which lets GCC keep an array of them in registers.
typedef int32_t Sums __attribute__((vector_size(64)));

// dot[k][cell] of the panel that begins with a prototype, coarsely.
MELIAD_TARGET inline void multiply(const PackedClass& prototypes, int64_t first, const Embeddings& embeddings,
                                   float (&dot)[kPrototypes][kCells]) {
  const int8_t* panel = prototypes.bytes.data() + first * embeddings.stride;
  Sums sums[kPrototypes][2] = {};
  for (int64_t group = 0; group < embeddings.stride / kGroup; ++group) {
    const __m512i low = _mm512_loadu_si512(embeddings.bytes + group * kCells * kGroup);
    const __m512i high = _mm512_loadu_si512(embeddings.bytes + group * kCells * kGroup + kLanes * kGroup);
#pragma GCC unroll 16
    for (int k = 0; k < kPrototypes; ++k) {
      int32_t values;
      std::memcpy(&values, panel + (group * kPrototypes + k) * kGroup, sizeof values);
      const __m512i prototype = _mm512_set1_epi32(values);
      sums[k][0] = Sums(_mm512_dpbusd_epi32(__m512i(sums[k][0]), low, prototype));
      sums[k][1] = Sums(_mm512_dpbusd_epi32(__m512i(sums[k][1]), high, prototype));
    }
  }
  const __m512 low_scales = _mm512_loadu_ps(embeddings.scales),
               high_scales = _mm512_loadu_ps(embeddings.scales + kLanes);
#pragma GCC unroll 16
  for (int k = 0; k < kPrototypes; ++k) {
    const __m512 scale = _mm512_set1_ps(prototypes.scales[size_t(first + k)]);
    const __m512i shift = _mm512_set1_epi32(prototypes.shifts[size_t(first + k)]);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_add_epi32(__m512i(sums[k][0]), shift));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_add_epi32(__m512i(sums[k][1]), shift));
    _mm512_storeu_ps(dot[k], _mm512_mul_ps(low, _mm512_mul_ps(low_scales, scale)));
    _mm512_storeu_ps(dot[k] + kLanes, _mm512_mul_ps(high, _mm512_mul_ps(high_scales, scale)));
  }
}

#include "patch_entropy_screen_loops.hpp"

// A cell or prototype of this size is rounded to zeros as a whole: its scale could not be inverted.
constexpr float kNothing = 1e-30f;

MELIAD_TARGET void pack_cells(const TileInput& input, const Embeddings& embeddings, CellNorms& norms, float* along) {
  for (int half = 0; half < 2; ++half) {
    const int64_t left = std::clamp<int64_t>(input.valid - half * kLanes, 0, kLanes);
    const auto valid = __mmask16((1u << left) - 1);
    const float* const z = input.z + half * kLanes;
    __m512 squared_sum = _mm512_setzero_ps(), along_sum = squared_sum, largest = squared_sum;
    for (int64_t first = 0; first < embeddings.stride; first += kLanes) {
      __m512 rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = _mm512_setzero_ps();
        if (first + i >= input.depth) continue;
        rows[i] = _mm512_maskz_loadu_ps(valid, z + (first + i) * input.row_stride);
        squared_sum = _mm512_fmadd_ps(rows[i], rows[i], squared_sum);
        along_sum = _mm512_fmadd_ps(rows[i], _mm512_set1_ps(input.direction[first + i]), along_sum);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(rows[i]));
      }
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) {
        _mm512_storeu_ps(embeddings.columns + (half * kLanes + i) * embeddings.stride + first, rows[i]);
      }
    }
    const __m512 scale = _mm512_mul_ps(largest, _mm512_set1_ps(1 / kLargest));
    const __mmask16 something = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(kNothing), _CMP_GT_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(something, _mm512_set1_ps(kLargest), largest);
    __m512 rounding_sum = _mm512_setzero_ps();
    for (int64_t first = 0; first < embeddings.stride; first += kGroup) {
      __m512i bytes = _mm512_setzero_si512();
      for (int i = 0; i < kGroup && first + i < input.depth; ++i) {
        const __m512 row = _mm512_maskz_loadu_ps(valid, z + (first + i) * input.row_stride);
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(row, inverse));
        const __m512 rounding = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(rounded), scale, row);
        rounding_sum = _mm512_fmadd_ps(rounding, rounding, rounding_sum);
        const __m512i byte = _mm512_and_si512(rounded, _mm512_set1_epi32(0xFF));
        bytes = _mm512_or_si512(bytes, _mm512_slli_epi32(byte, unsigned(8 * i)));
      }
      bytes = _mm512_xor_si512(bytes, _mm512_set1_epi8(char(kZero)));  // adds it to each
      _mm512_storeu_si512(embeddings.bytes + first * kCells + half * kLanes * kGroup, bytes);
    }
    _mm512_store_ps(norms.squared_norm + half * kLanes, squared_sum);
    _mm512_store_ps(norms.rounding + half * kLanes, rounding_sum);
    _mm512_storeu_ps(embeddings.scales + half * kLanes, scale);
    _mm512_storeu_ps(along + half * kLanes, along_sum);
  }
}

}  // namespace

bool pays(const float* rows, int64_t count, int64_t depth, float softness) {
  return depth <= kMostChannels && screening_pays(rows, count, depth, softness, kProductError);
}

void pack(const float* rows, int64_t count, int64_t depth, float softness, PackedClass& packed) {
  const int64_t stride = padded(depth), all = (count + kPrototypes - 1) / kPrototypes * kPrototypes;
  packed.reach = screening_reach(count, softness);
  packed.rows.assign(rows, rows + count * depth);
  packed.bytes.assign(size_t(all * stride), 0);
  packed.scales.assign(size_t(all), 0);
  packed.shifts.assign(size_t(all), 0);
  for (int64_t k = 0; k < count; ++k) {
    const float* const row = rows + k * depth;
    float largest = 0;
    for (int64_t i = 0; i < depth; ++i) largest = std::max(largest, std::fabs(row[i]));
    const float scale = largest / kLargest;
    double rounding = 0;
    for (int64_t i = 0; i < depth; ++i) {
      const float byte = largest > kNothing ? std::nearbyint(row[i] * (kLargest / largest)) : 0;
      const int64_t group = k / kPrototypes * (stride / kGroup) + i / kGroup;
      packed.bytes[size_t((group * kPrototypes + k % kPrototypes) * kGroup + i % kGroup)] = int8_t(byte);
      packed.shifts[size_t(k)] -= kZero * int32_t(byte);
      rounding += (double(row[i]) - double(byte) * scale) * (double(row[i]) - double(byte) * scale);
    }
    packed.scales[size_t(k)] = scale;
    packed.lengths.push_back(std::sqrt(packed.squared_norms[size_t(k)]));
    packed.rounding_lengths.push_back(float(std::sqrt(rounding)));
  }
}

int64_t scratch_size(int64_t depth) {
  return kCells * padded(depth) + kCells + kCells * padded(depth) / int64_t{sizeof(float)};
}

MELIAD_TARGET void score_tile(const TileInput& input, TileSummary& summary) {
  const Embeddings embeddings = embeddings_in(input.scratch, input.depth);
  CellNorms norms;
  pack_cells(input, embeddings, norms, summary.along);
  ClassPass(input, embeddings, norms, *input.normal, summary.normal).run();
  ClassPass(input, embeddings, norms, *input.anomaly, summary.anomaly).run();
}

}  // namespace meliad::cpu::vnni

#endif
