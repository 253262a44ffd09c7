#include "cpu_kernel.hpp"

#include <atomic>
#include <new>

namespace meliad::onnxruntime {
namespace {

cpu::PatchEntropyScorer make_scorer(const PatchEntropyParameters& parameters, const Prototypes& prototypes) {
  return {parameters, prototypes.values, prototypes.count, prototypes.depth};
}

void score(const Ort::KernelContext& context, const cpu::PatchEntropyScorer& scorer, const PatchEntropyBatch& batch) {
  struct Run {
    const cpu::PatchEntropyScorer& scorer;
    const PatchEntropyBatch& batch;
    std::atomic<bool> out_of_memory{false};
  } run{scorer, batch};
  const auto score_tile = [](void* argument, size_t tile) noexcept {
    auto& run = *static_cast<Run*>(argument);
    try {
      run.scorer.score_tile(run.batch, int64_t(tile));
    } catch (const std::bad_alloc&) {  // must not unwind into a thread of the host
      run.out_of_memory = true;
    }
  };
  const auto tiles = size_t(scorer.tile_count(batch));
  context.ParallelFor(score_tile, tiles, tiles, &run);  // as many batches as tiles: finer than without a number
  if (run.out_of_memory) throw std::bad_alloc();
  scorer.score_images(batch);
}

}  // namespace

CpuKernel::CpuKernel(const OrtKernelInfo* raw_info) {
  const Ort::ConstKernelInfo info(raw_info);
  parameters_ = read_parameters(info);
  int is_constant = 0;
  const Ort::ConstValue prototypes = info.GetTensorConstantInput(kPrototypes, &is_constant);
  if (is_constant) packed_.emplace(make_scorer(parameters_, read_prototypes(prototypes)));
}

OrtStatusPtr CpuKernel::ComputeV2(OrtKernelContext* raw_context) const noexcept {
  return as_status([&] {
    const Ort::KernelContext context(raw_context);
    const auto compute = [&](const cpu::PatchEntropyScorer& scorer) {
      score(context, scorer, read_batch(context, parameters_, scorer.depth()));
    };
    packed_ ? compute(*packed_) : compute(make_scorer(parameters_, read_prototypes(context)));
  });
}

}  // namespace meliad::onnxruntime
