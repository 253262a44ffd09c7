// The definition of PatchEntropyScore in plain C++, for tests of kernels without Python. Real is double for the
// definition itself, float for the plain version that kernels are compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "../patch_entropy.hpp"

namespace meliad::reference {

// Distances from one cell of one image to prototypes [count, depth]; z points at channel 0 of the cell.
template <typename Real>
std::vector<Real> distances(const float* z, int64_t cell_stride, const float* prototypes, int64_t count,
                            int64_t depth) {
  std::vector<Real> d(count);
  for (int64_t k = 0; k < count; ++k) {
    Real zz = 0, pp = 0, zp = 0;
    for (int64_t i = 0; i < depth; ++i) {
      const Real a = z[i * cell_stride], b = prototypes[k * depth + i];
      zz += a * a, pp += b * b, zp += a * b;
    }
    const Real squared = zz + pp - 2 * zp;
    d[k] = std::sqrt(squared < 0 ? 0 : squared);  // NaN is not less than 0 and stays
  }
  return d;
}

// -T log sum_k exp(-d_k / T)
template <typename Real>
Real soft_minimum(const std::vector<Real>& d, Real softness) {
  const Real minimum = *std::min_element(d.begin(), d.end());
  Real total = 0;
  for (Real distance : d) total += std::exp((minimum - distance) / softness);
  return minimum - softness * std::log(total);
}

// H(p) in bits of p = sigmoid(x)
template <typename Real>
Real binary_entropy_bits(Real x) {
  const Real q = std::exp(-std::fabs(x));
  return (std::log1p(q) + std::fabs(x) * q / (1 + q)) / std::log(Real(2));
}

template <typename Real = double>
void patch_entropy_score(const PatchEntropyParameters& parameters, const float* prototypes, int64_t count,
                         const PatchEntropyBatch& batch) {
  const Real nan = std::numeric_limits<Real>::quiet_NaN();
  const int64_t n_normal = parameters.n_normal, depth = batch.depth, cells = batch.cells;
  for (int64_t n = 0; n < batch.images; ++n) {
    std::vector<Real> evidence(cells);
    for (int64_t u = 0; u < cells; ++u) {
      const float* z = batch.z + n * depth * cells + u;
      bool finite = true;
      Real along = 0;
      for (int64_t i = 0; i < depth; ++i) {
        finite = finite && std::isfinite(z[i * cells]);
        along += Real(batch.direction[i]) * z[i * cells];
      }
      const auto normal = distances<Real>(z, cells, prototypes, n_normal, depth);
      const auto anomaly = distances<Real>(z, cells, prototypes + n_normal * depth, count - n_normal, depth);
      const Real activation_normal = -parameters.normal_scale * soft_minimum(normal, Real(parameters.softness));
      const Real activation_anomaly =
          -parameters.anomaly_scale * soft_minimum(anomaly, Real(parameters.softness)) + along + parameters.bias;
      const Real x = activation_anomaly - activation_normal;
      const Real value = (1 - parameters.kappa * binary_entropy_bits(x)) * x;
      evidence[u] = finite && std::isfinite(value) ? value : nan;
      batch.map[n * cells + u] = float(evidence[u]);
      const auto argmin = [finite](const std::vector<Real>& d) {
        return finite ? std::min_element(d.begin(), d.end()) - d.begin() : 0;
      };
      batch.nearest[(2 * n + 0) * cells + u] = argmin(normal);
      batch.nearest[(2 * n + 1) * cells + u] = n_normal + argmin(anomaly);
    }
    Real total = 0;
    if (std::any_of(evidence.begin(), evidence.end(), [](Real value) { return std::isnan(value); })) {
      total = nan;
    } else {
      std::sort(evidence.begin(), evidence.end(), std::greater<>());
      for (int64_t i = 0; i < parameters.top_cells; ++i) total += evidence[i];
    }
    batch.score[n] = float(total / Real(parameters.top_cells) + parameters.offset);
  }
}

}  // namespace meliad::reference
