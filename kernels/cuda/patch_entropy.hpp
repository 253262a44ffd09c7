// PatchEntropyScore on a CUDA device: single or half precision in, single precision inside.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../patch_entropy.hpp"
#include "cuda.hpp"

namespace meliad::cuda {

// Bytes of device memory that a run needs beside its inputs and outputs; it does not grow with the prototypes.
size_t workspace_bytes(int64_t images, int64_t cells);

// Enqueues one run on the stream: no allocation, no synchronisation. All pointers are to device memory, those of the
// workspace and of nearest aligned to 8 bytes. Prototypes are [count, depth]. On one device results do not depend on
// what else is in the batch. Returns cudaErrorInvalidValue for shapes that do not fit the parameters or a
// grid: one image and the prototypes have fewer than 2^31 elements, and 2^24 channels and cells at most.
template <typename Element>
cudaError_t score_patches(const PatchEntropyParameters& parameters, const Element* prototypes, int64_t count,
                          const PatchEntropyBatchOf<Element>& batch, void* workspace, cudaStream_t stream);

}  // namespace meliad::cuda
