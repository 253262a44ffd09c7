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

#include "patch_entropy_screening.hpp"

#define MELIAD_TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,fma,amx-tile,amx-bf16")))

namespace meliad::cpu::amx {
namespace {

constexpr int kLanes = 16;
constexpr int kTileRows = 16,
              kTileDepth = 32;  // a tile is 16 prototypes of 32 channels, or 16 pairs of channels of 16 cells
constexpr int kTileValues = kTileRows * kTileDepth;
// What rounding to 8 bits of mantissa takes from both factors at most, as a share of the product of their lengths.
constexpr float kProductError = 0x1p-7f;

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

// dot[k][cell] of the panel that begins with a prototype, coarsely.
MELIAD_TARGET inline void multiply(const PackedClass& prototypes, int64_t first, const Embeddings& embeddings,
                                   float (&dot)[kPrototypes][kCells]) {
  const int64_t chunk_count = embeddings.stride / kTileDepth;
  const uint16_t *panel = prototypes.coarse.data() + first * embeddings.stride, *cells = embeddings.coarse;
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

#include "patch_entropy_screen_loops.hpp"

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

bool pays(const float* rows, int64_t count, int64_t depth, float softness) {
  return screening_pays(rows, count, depth, softness, kProductError);
}

void pack(const float* rows, int64_t count, int64_t depth, float softness, PackedClass& packed) {
  const int64_t chunk_count = chunks(depth), panels = (count + kPrototypes - 1) / kPrototypes;
  packed.reach = screening_reach(count, softness);
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
