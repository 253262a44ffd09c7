// Which instructions the CPU kernels may use.
#pragma once

namespace meliad::cpu {

enum class InstructionSet { kBaseline, kAvx2, kAvx512, kVnni, kAmx };

// The best instruction set of this processor, kBaseline being SSE2 on x86-64 and NEON on aarch64; at most the one that
// the environment names in MELIAD_EDGE_INSTRUCTION_SET: baseline, avx2, avx512, vnni (AVX-512 with it) or amx. Throws
// std::invalid_argument when it names another.
InstructionSet best_instruction_set();

}  // namespace meliad::cpu
