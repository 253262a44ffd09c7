#include "patch_entropy_screening.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace meliad::cpu {
namespace {

constexpr double kLog2 = 0.6931471805599453;
// Up to this share of prototypes within reach of the nearest one, settling costs less than exact products of all.
constexpr double kLargestShare = 0.1;
constexpr int kSums = 16;

float squared_distance(const float* a, const float* b, int64_t depth) {
  float sums[kSums] = {};
  for (int64_t i = 0; i < depth; ++i) sums[i % kSums] += (a[i] - b[i]) * (a[i] - b[i]);
  float total = 0;
  for (const float sum : sums) total += sum;
  return total;
}

float squared_norm(const float* values, int64_t depth) {
  return std::inner_product(values, values + depth, values, 0.0f);
}

}  // namespace

float screening_reach(int64_t count, float softness) {
  return float(softness * (25 * kLog2 + std::log(double(count))));
}

bool screening_pays(const float* rows, int64_t count, int64_t depth, float softness, float product_error) {
  if (!std::all_of(rows, rows + count * depth, [](float value) { return std::fabs(value) < 1e15f; })) return false;
  const float reach = screening_reach(count, softness);
  constexpr int64_t kSamples = 8;
  float longest = 0;
  for (int64_t k = 0; k < count; ++k) longest = std::max(longest, squared_norm(rows + k * depth, depth));
  // Both the nearest one and those within its reach are known up to this.
  const float error = 2 * product_error * longest;
  std::vector<float> squared;
  double within = 0;
  int64_t samples = 0;
  for (int64_t i = 0; i < count; i += std::max<int64_t>(1, count / kSamples), ++samples) {
    squared.clear();
    for (int64_t k = 0; k < count; ++k) {
      if (k != i) squared.push_back(squared_distance(rows + i * depth, rows + k * depth, depth));
    }
    if (squared.empty()) return true;
    const float farthest = std::sqrt(*std::min_element(squared.begin(), squared.end()) + error) + reach;
    within += double(std::count_if(squared.begin(), squared.end(),
                                   [&](float distance) { return distance - error <= farthest * farthest; }));
  }
  return within <= kLargestShare * double(count * samples) + 2 * double(samples);
}

}  // namespace meliad::cpu
