#include "meliad_kernels.h"

#include <exception>
#include <stdexcept>
#include <string>

#include "../cpu/patch_entropy.hpp"
#include "../parameters.hpp"
#ifdef MELIAD_WITH_CUDA
#include "../cuda/patch_entropy.hpp"
#include "../cuda/preprocess.hpp"
#endif

#define MELIAD_EXPORT extern "C" __attribute__((visibility("default")))

struct meliad_scorer {
  meliad::cpu::PatchEntropyScorer scorer;
  int64_t top_cells;
};

namespace {

using meliad::PatchEntropyBatch;
using meliad::PatchEntropyBatchOf;
using meliad::PatchEntropyParameters;

thread_local std::string last_error;

// Runs a piece of work; what it throws is remembered, and the result is what the caller takes for a failure.
template <typename Result, typename Work>
Result guarded(Result failure, Work&& work) noexcept {
  try {
    return work();
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "PatchEntropyScore: unknown error";
  }
  return failure;
}

PatchEntropyParameters from_c(const meliad_parameters& parameters) {
  return {parameters.n_normal,      parameters.top_cells, parameters.softness, parameters.normal_scale,
          parameters.anomaly_scale, parameters.bias,      parameters.kappa,    parameters.offset};
}

template <typename Element>
PatchEntropyBatchOf<Element> from_c(const meliad_batch& batch) {
  return {batch.images,    batch.depth, batch.cells, static_cast<const Element*>(batch.z),
          batch.direction, batch.score, batch.map,   batch.nearest};
}

PatchEntropyBatch fitting(const meliad_scorer& scorer, const meliad_batch& batch) {
  const int64_t depth = scorer.scorer.depth(), top_cells = scorer.top_cells;
  if (batch.images < 0 || batch.cells < top_cells || batch.depth != depth) {
    meliad::refuse("z has shape [" + std::to_string(batch.images) + ", " + std::to_string(batch.depth) + ", " +
                   std::to_string(batch.cells) + "], expected [N, " + std::to_string(depth) +
                   ", cells] with at least " + std::to_string(top_cells) + " cells");
  }
  return from_c<float>(batch);
}

}  // namespace

MELIAD_EXPORT const char* meliad_last_error(void) { return last_error.c_str(); }

MELIAD_EXPORT meliad_scorer* meliad_scorer_create(const meliad_parameters* parameters, const float* prototypes,
                                                  int64_t count, int64_t depth) {
  return guarded<meliad_scorer*>(nullptr, [&] {
    if (depth < 1) meliad::refuse("prototypes have depth " + std::to_string(depth) + "; it must be at least 1");
    return new meliad_scorer{{from_c(*parameters), prototypes, count, depth}, parameters->top_cells};
  });
}

MELIAD_EXPORT void meliad_scorer_destroy(meliad_scorer* scorer) { delete scorer; }

MELIAD_EXPORT int64_t meliad_scorer_tile_count(const meliad_scorer* scorer, const meliad_batch* batch) {
  return scorer->scorer.tile_count(from_c<float>(*batch));
}

MELIAD_EXPORT int meliad_scorer_score_tiles(const meliad_scorer* scorer, const meliad_batch* batch, int64_t first,
                                            int64_t end) {
  return guarded(-1, [&] {
    const PatchEntropyBatch checked = fitting(*scorer, *batch);
    const int64_t tiles = scorer->scorer.tile_count(checked);
    if (first < 0 || end > tiles) {
      meliad::refuse("tiles [" + std::to_string(first) + ", " + std::to_string(end) + ") of " + std::to_string(tiles));
    }
    for (int64_t tile = first; tile < end; ++tile) scorer->scorer.score_tile(checked, tile);
    return 0;
  });
}

MELIAD_EXPORT int meliad_scorer_score_images(const meliad_scorer* scorer, const meliad_batch* batch) {
  return guarded(-1, [&] {
    scorer->scorer.score_images(fitting(*scorer, *batch));
    return 0;
  });
}

#ifdef MELIAD_WITH_CUDA

namespace {

// Remembers what a CUDA error means.
int noted(cudaError_t error) {
  if (error != cudaSuccess) last_error = std::string("CUDA: ") + cudaGetErrorString(error);
  return int(error);
}

}  // namespace

MELIAD_EXPORT size_t meliad_cuda_workspace_bytes(int64_t images, int64_t cells) {
  return meliad::cuda::workspace_bytes(images, cells);
}

MELIAD_EXPORT int meliad_cuda_score_patches(const meliad_parameters* parameters, const void* prototypes, int64_t count,
                                            int half, const meliad_batch* batch, void* workspace, void* stream) {
  const auto score = [&](auto element) {
    using Element = decltype(element);
    return meliad::cuda::score_patches(from_c(*parameters), static_cast<const Element*>(prototypes), count,
                                       from_c<Element>(*batch), workspace, static_cast<cudaStream_t>(stream));
  };
  return noted(half ? score(meliad::cuda::Half{}) : score(float{}));
}

namespace {

meliad::cuda::ResizePlan plan_of(const meliad_frame& frame) {
  return meliad::cuda::plan_resize({frame.height, frame.width}, {frame.model_height, frame.model_width});
}

meliad::cuda::Frame from_c(const meliad_frame& frame) {
  using meliad::cuda::ChannelOrder;
  return {frame.pixels, frame.pitch, frame.is_bgr ? ChannelOrder::kBgr : ChannelOrder::kRgb};
}

}  // namespace

MELIAD_EXPORT int meliad_cuda_preprocess_bytes(const meliad_frame* frame, uint8_t* image, void* stream) {
  return noted(meliad::cuda::preprocess(plan_of(*frame), from_c(*frame), image, static_cast<cudaStream_t>(stream)));
}

MELIAD_EXPORT int meliad_cuda_preprocess_planes(const meliad_frame* frame, const float mean[3],
                                                const float deviation[3], int half, void* image, void* stream) {
  const meliad::cuda::Normalisation normalisation{{mean[0], mean[1], mean[2]},
                                                  {deviation[0], deviation[1], deviation[2]}};
  const auto preprocess = [&](auto element) {
    return meliad::cuda::preprocess(plan_of(*frame), from_c(*frame), normalisation,
                                    static_cast<decltype(element)*>(image), static_cast<cudaStream_t>(stream));
  };
  return noted(half ? preprocess(meliad::cuda::Half{}) : preprocess(float{}));
}

#endif
