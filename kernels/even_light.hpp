// Parameters of the operator EvenLight (domain "meliad", version 1), shared by every implementation.
// The equation is spelled out in reference/even_light.py.
#pragma once

#include <array>

namespace meliad {

constexpr int kColours = 3;

// Attributes of the node.
struct EvenLightParameters {
  float mean, spread;     // brightness of every image afterwards, of 255
  float smallest_spread;  // > 0, added to the spread of the image, so that a flat one is stretched less
  std::array<float, kColours> shift, scale;
};

}  // namespace meliad
