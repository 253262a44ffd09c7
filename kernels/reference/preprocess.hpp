// The definition of the resize in plain C++ and double precision, for checks without Python; preprocess.py has the
// weights as matrices.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../cuda/preprocess.hpp"

namespace meliad::reference {

// What one sample along one side is made of: pixels from first on, with their weights.
struct Taps {
  int first;
  std::vector<double> weights;
};

// Averages over source / target pixels; the two at the ends may count in part.
inline Taps area_taps(int index, int source, int target) {
  const double begin = double(index) * source / target, end = double(index + 1) * source / target;
  Taps taps{int(begin), {}};
  for (int i = taps.first; i < std::min(source, int(std::ceil(end - 1e-9))); ++i) {
    taps.weights.push_back((std::min(end, i + 1.0) - std::max(begin, double(i))) / (end - begin));
  }
  return taps;
}

// Interpolates between the centres of pixels; beyond the outermost ones their value holds.
inline Taps linear_taps(int index, int source, int target) {
  const double centre = std::clamp((index + 0.5) * source / target - 0.5, 0.0, source - 1.0);
  const int first = std::min(int(centre), std::max(0, source - 2));
  if (source == 1) return {0, {1.0}};
  return {first, {1 - (centre - first), centre - first}};
}

template <typename TapsOf>
std::vector<double> resample(const std::vector<double>& image, cuda::Size from, cuda::Size to, TapsOf taps_of) {
  if (from.height == to.height && from.width == to.width) return image;
  std::vector<double> result(size_t(3) * to.height * to.width, 0.0);
  for (int y = 0; y < to.height; ++y) {
    const Taps rows = taps_of(y, from.height, to.height);
    for (int x = 0; x < to.width; ++x) {
      const Taps columns = taps_of(x, from.width, to.width);
      for (size_t i = 0; i < rows.weights.size(); ++i) {
        for (size_t j = 0; j < columns.weights.size(); ++j) {
          const size_t pixel = (size_t(rows.first) + i) * from.width + columns.first + j;
          for (size_t c = 0; c < 3; ++c) {
            result[3 * (size_t(y) * to.width + x) + c] += rows.weights[i] * columns.weights[j] * image[3 * pixel + c];
          }
        }
      }
    }
  }
  return result;
}

// The frame at model size, [height, width, 3]; the steps before the last round to whole levels, as the package does.
inline std::vector<double> resize(const cuda::ResizePlan& plan, const std::vector<uint8_t>& frame) {
  std::vector<double> image(frame.begin(), frame.end());
  image = resample(image, plan.frame, plan.averaged, area_taps);
  // OpenCV rounds averages over 2 x 2 pixels half up, everything else half to even.
  for (double& value : image) value = plan.factor == 2 ? std::floor(value + 0.5) : std::nearbyint(value);
  image = resample(image, plan.averaged, plan.reduced, area_taps);
  for (double& value : image) value = std::nearbyint(value);
  return resample(image, plan.reduced, plan.model, linear_taps);
}

}  // namespace meliad::reference
