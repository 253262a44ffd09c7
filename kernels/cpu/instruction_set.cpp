#include "instruction_set.hpp"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "patch_entropy_amx.hpp"

namespace meliad::cpu {
namespace {

InstructionSet best_of_processor() {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma")) {
    if (!__builtin_cpu_supports("avx512vnni")) return InstructionSet::kAvx512;
    return amx::supported() ? InstructionSet::kAmx : InstructionSet::kVnni;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kBaseline;
}

InstructionSet most_allowed() {
  const char* text = std::getenv("MELIAD_EDGE_INSTRUCTION_SET");
  const std::string name = text == nullptr ? "amx" : text;
  if (name == "amx") return InstructionSet::kAmx;
  if (name == "vnni") return InstructionSet::kVnni;
  if (name == "avx512") return InstructionSet::kAvx512;
  if (name == "avx2") return InstructionSet::kAvx2;
  if (name == "baseline") return InstructionSet::kBaseline;
  throw std::invalid_argument("MELIAD_EDGE_INSTRUCTION_SET is \"" + name +
                              "\"; it must be baseline, avx2, avx512, vnni or amx");
}

}  // namespace

InstructionSet best_instruction_set() { return std::min(most_allowed(), best_of_processor()); }

}  // namespace meliad::cpu
