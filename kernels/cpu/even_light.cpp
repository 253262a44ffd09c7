#include "even_light.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace meliad::cpu {
namespace {

constexpr int64_t kValuesPerSum = 65536;  // times 255 squared is less than 2^32

#ifdef __x86_64__
namespace avx512 {
#define MELIAD_TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma")))
#include "even_light_inner_loops.hpp"
#undef MELIAD_TARGET
}  // namespace avx512

namespace avx2 {
#define MELIAD_TARGET __attribute__((target("avx2,fma")))
#include "even_light_inner_loops.hpp"
#undef MELIAD_TARGET
}  // namespace avx2
#endif

namespace baseline {
#define MELIAD_TARGET
#include "even_light_inner_loops.hpp"
#undef MELIAD_TARGET
}  // namespace baseline

struct Loops {
  decltype(&baseline::add_up) add_up;
  decltype(&baseline::write_planes) write_planes;
};

Loops loops(InstructionSet instruction_set) {
  switch (instruction_set) {
#ifdef __x86_64__
    case InstructionSet::kAmx:
    case InstructionSet::kVnni:
    case InstructionSet::kAvx512:
      return {avx512::add_up, avx512::write_planes};
    case InstructionSet::kAvx2:
      return {avx2::add_up, avx2::write_planes};
#endif
    default:
      return {baseline::add_up, baseline::write_planes};
  }
}

EvenLightParameters checked(const EvenLightParameters& parameters) {
  const auto are_finite = [](const std::array<float, kColours>& values) {
    return std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); });
  };
  if (!(parameters.smallest_spread > 0 && std::isfinite(parameters.smallest_spread))) {
    throw std::invalid_argument("EvenLight: smallest_spread is " + std::to_string(parameters.smallest_spread) +
                                "; it must be positive and finite");
  }
  if (!(std::isfinite(parameters.mean) && std::isfinite(parameters.spread) && are_finite(parameters.shift) &&
        are_finite(parameters.scale))) {
    throw std::invalid_argument("EvenLight: mean, spread, shift and scale must be finite");
  }
  return parameters;
}

}  // namespace

EvenLight::EvenLight(const EvenLightParameters& parameters, InstructionSet instruction_set)
    : parameters_(checked(parameters)), instruction_set_(std::min(instruction_set, best_instruction_set())) {}

Light EvenLight::measure(const uint8_t* image, int64_t pixels) const {
  const int64_t count = pixels * kColours;
  uint64_t sum = 0, squares = 0;
  for (int64_t i = 0; i < count; i += kValuesPerSum) {
    loops(instruction_set_).add_up(image + i, std::min(kValuesPerSum, count - i), sum, squares);
  }
  // Both sums around the whole number nearest to the mean, still exact: nothing is left to cancel.
  const int64_t centre = std::llround(double(sum) / double(count));
  const int64_t centred_squares = int64_t(squares) - 2 * centre * int64_t(sum) + centre * centre * count;
  const double rest = double(int64_t(sum) - centre * count) / double(count);
  const double spread = std::sqrt(std::max(0.0, double(centred_squares) / double(count) - rest * rest));

  Light light;
  light.centre = float(centre);
  const double stretch = parameters_.spread / (spread + parameters_.smallest_spread);
  for (int colour = 0; colour < kColours; ++colour) {
    const double shift = parameters_.shift[colour], scale = parameters_.scale[colour];
    const float black = float(-shift * scale), white = float((255 - shift) * scale);
    light.lines[colour] = {float(stretch * scale), float((parameters_.mean - shift - rest * stretch) * scale),
                           std::min(black, white), std::max(black, white)};
  }
  return light;
}

void EvenLight::write(const uint8_t* image, int64_t pixels, const Light& light, int64_t first, int64_t end,
                      float* planes) const {
  loops(instruction_set_)
      .write_planes(image + first * kColours, end - first, light,
                    {planes + first, planes + pixels + first, planes + 2 * pixels + first});
}

}  // namespace meliad::cpu
