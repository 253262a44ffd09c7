// Runs one implementation of PatchEntropyScore on a case from standard input and writes its outputs to standard output,
// so that a test can compare implementations, and instruction sets, under the sanitizers this file is compiled with.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../../kernels/cpu/patch_entropy.hpp"
#include "../../kernels/cuda/patch_entropy.hpp"
#include "../../kernels/reference/patch_entropy.hpp"

namespace {

struct Header {
  int64_t images, depth, cells, prototypes;
  meliad::PatchEntropyParameters parameters;
};

template <typename Value>
std::vector<Value> read(size_t count) {
  std::vector<Value> values(count);
  if (std::fread(values.data(), sizeof(Value), count, stdin) != count) std::exit(2);
  return values;
}

template <typename Value>
void write(const std::vector<Value>& values) {
  std::fwrite(values.data(), sizeof(Value), values.size(), stdout);
}

// The CUDA kernels, executed on the CPU, with inputs of that precision.
template <typename Element>
int run_cuda(const Header& header, const std::vector<float>& prototypes, const meliad::PatchEntropyBatch& batch) {
  const std::vector<Element> z(batch.z, batch.z + header.images * header.depth * header.cells);
  const std::vector<Element> converted(prototypes.begin(), prototypes.end());
  std::vector<char> workspace(meliad::cuda::workspace_bytes(header.images, header.cells));
  const meliad::PatchEntropyBatchOf<Element> same{batch.images,    batch.depth, batch.cells, z.data(),
                                                  batch.direction, batch.score, batch.map,   batch.nearest};
  return meliad::cuda::score_patches(header.parameters, converted.data(), header.prototypes, same, workspace.data(),
                                     nullptr);
}

}  // namespace

int main(int, char** arguments) {
  using meliad::cpu::InstructionSet;
  const std::string implementation = arguments[1];
  const Header header = read<Header>(1)[0];
  const auto z = read<float>(header.images * header.depth * header.cells);
  const auto prototypes = read<float>(header.prototypes * header.depth);
  const auto direction = read<float>(header.depth);
  std::vector<float> score(header.images), map(header.images * header.cells);
  std::vector<int64_t> nearest(2 * map.size());
  const meliad::PatchEntropyBatch batch{header.images,    header.depth, header.cells, z.data(),
                                        direction.data(), score.data(), map.data(),   nearest.data()};

  if (implementation == "reference") {
    meliad::reference::patch_entropy_score(header.parameters, prototypes.data(), header.prototypes, batch);
  } else if (implementation == "cuda") {
    if (const int error = run_cuda<float>(header, prototypes, batch)) return error;
  } else if (implementation == "cuda-half") {
    if (const int error = run_cuda<meliad::cuda::Half>(header, prototypes, batch)) return error;
  } else {
    const InstructionSet wanted = implementation == "amx"      ? InstructionSet::kAmx
                                  : implementation == "vnni"   ? InstructionSet::kVnni
                                  : implementation == "avx512" ? InstructionSet::kAvx512
                                  : implementation == "avx2"   ? InstructionSet::kAvx2
                                                               : InstructionSet::kBaseline;
    if (wanted > meliad::cpu::best_instruction_set()) return 3;
    const meliad::cpu::PatchEntropyScorer scorer(header.parameters, prototypes.data(), header.prototypes, header.depth,
                                                 wanted);
    const char* const names[] = {"baseline", "avx2", "avx512", "vnni", "amx"};
    std::fprintf(stderr, "%s", names[int(scorer.instruction_set())]);                           // what it chose
    for (int64_t tile = scorer.tile_count(batch); tile-- > 0;) scorer.score_tile(batch, tile);  // order is free
    scorer.score_images(batch);
  }
  write(score);
  write(map);
  write(nearest);
}
