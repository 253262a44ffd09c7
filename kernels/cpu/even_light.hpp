// EvenLight on the CPU: one pass over the bytes for exact sums, one that writes planes of floats. No allocation.
#pragma once

#include <array>
#include <cstdint>

#include "../even_light.hpp"
#include "instruction_set.hpp"

namespace meliad::cpu {

// What happens to every value of one image: (value - centre) * gain + offset, and no further than its ends.
struct Light {
  struct Line {
    float gain, offset, smallest, largest;
  };
  float centre;  // a whole number, so that the difference is exact
  std::array<Line, kColours> lines;
};

// Images are uint8 [pixels, 3], planes float32 [3, pixels]. Runs are thread-safe, and results do not depend on where an
// image is cut into ranges of pixels.
class EvenLight {
 public:
  // Throws std::invalid_argument for parameters that no image could make right.
  explicit EvenLight(const EvenLightParameters& parameters, InstructionSet instruction_set = best_instruction_set());

  // Measures an image of at least one pixel.
  Light measure(const uint8_t* image, int64_t pixels) const;

  // Writes the planes of the pixels [first, end).
  void write(const uint8_t* image, int64_t pixels, const Light& light, int64_t first, int64_t end, float* planes) const;

 private:
  EvenLightParameters parameters_;
  InstructionSet instruction_set_;
};

}  // namespace meliad::cpu
