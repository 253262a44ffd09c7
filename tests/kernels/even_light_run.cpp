// Runs EvenLight on frames from standard input and writes its planes to standard output, so that a test can compare
// instruction sets under the sanitizers, or the emulator, that this file is compiled for.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../../kernels/cpu/even_light.hpp"

int main(int, char** arguments) {
  using meliad::cpu::InstructionSet;
  const std::string name = arguments[1];
  const int64_t pixels_at_a_time = std::atoll(arguments[2]);
  const InstructionSet wanted = name == "avx512" ? InstructionSet::kAvx512
                                : name == "avx2" ? InstructionSet::kAvx2
                                                 : InstructionSet::kBaseline;
  if (wanted > meliad::cpu::best_instruction_set()) return 3;
  struct {
    int64_t images, pixels;
    meliad::EvenLightParameters parameters;
  } header;
  if (std::fread(&header, sizeof header, 1, stdin) != 1) return 2;
  const int64_t values = header.pixels * meliad::kColours;
  const meliad::cpu::EvenLight even_light(header.parameters, wanted);
  for (int64_t image = 0; image < header.images; ++image) {
    // As large as needed and no larger: the sanitizer sees every step beyond.
    std::vector<uint8_t> frame(static_cast<size_t>(values));
    std::vector<float> planes(static_cast<size_t>(values));
    if (std::fread(frame.data(), 1, frame.size(), stdin) != frame.size()) return 2;
    const meliad::cpu::Light light = even_light.measure(frame.data(), header.pixels);
    for (int64_t first = 0; first < header.pixels; first += pixels_at_a_time) {
      even_light.write(frame.data(), header.pixels, light, first, std::min(header.pixels, first + pixels_at_a_time),
                       planes.data());
    }
    std::fwrite(planes.data(), sizeof(float), planes.size(), stdout);
  }
}
