// Which parameters the operator refuses, for every implementation that is given them from outside.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>

#include "patch_entropy.hpp"

namespace meliad {

[[noreturn]] inline void refuse(const std::string& message) {
  throw std::invalid_argument("PatchEntropyScore: " + message);
}

// Throws std::invalid_argument for a value that no inputs could make right.
inline void check_parameters(const PatchEntropyParameters& parameters) {
  if (parameters.n_normal < 1) {
    refuse("n_normal is " + std::to_string(parameters.n_normal) + "; it must be at least 1");
  }
  if (parameters.top_cells < 1) {
    refuse("top_cells is " + std::to_string(parameters.top_cells) + "; it must be at least 1");
  }
  if (!(parameters.softness > 0 && std::isfinite(parameters.softness))) {
    refuse("softness is " + std::to_string(parameters.softness) + "; it must be positive and finite");
  }
  if (!(parameters.kappa >= 0 && parameters.kappa < 1)) {
    refuse("kappa is " + std::to_string(parameters.kappa) + "; it must lie in [0, 1)");
  }
}

// Throws std::invalid_argument when count prototypes do not make two classes.
inline void check_classes(const PatchEntropyParameters& parameters, int64_t count) {
  if (parameters.n_normal < 1 || parameters.n_normal >= count) {
    refuse("n_normal is " + std::to_string(parameters.n_normal) + " of " + std::to_string(count) +
           " prototypes; both classes need at least one");
  }
}

}  // namespace meliad
