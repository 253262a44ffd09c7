/* The kernels for programs that can load a C library: the PyTorch operator does with ctypes, and whoever has frames and
   embeddings in the memory of a CUDA device can. libmeliad_kernels.so. */
#ifndef MELIAD_KERNELS_H
#define MELIAD_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The attributes of PatchEntropyScore; kernels/patch_entropy.hpp explains them. */
typedef struct {
  int64_t n_normal, top_cells;
  float softness, normal_scale, anomaly_scale, bias, kappa, offset;
} meliad_parameters;

/* Inputs and outputs of one run: z [N, D, cells], direction [D], score [N], map [N, cells], nearest [N, 2, cells].
   z is float, or half where a function says so. */
typedef struct {
  int64_t images, depth, cells;
  const void* z;
  const float* direction;
  float* score;
  float* map;
  int64_t* nearest;
} meliad_batch;

typedef struct meliad_scorer meliad_scorer;

/* What the last call of this thread that failed complained about. */
const char* meliad_last_error(void);

/* A scorer for prototypes [count, depth], which it copies; NULL on failure. */
meliad_scorer* meliad_scorer_create(const meliad_parameters* parameters, const float* prototypes, int64_t count,
                                    int64_t depth);
void meliad_scorer_destroy(meliad_scorer* scorer);

/* A run is score_tiles for all tiles [0, tile_count), on any threads in any order, then score_images. Both return 0, or
   -1 on failure. */
int64_t meliad_scorer_tile_count(const meliad_scorer* scorer, const meliad_batch* batch);
int meliad_scorer_score_tiles(const meliad_scorer* scorer, const meliad_batch* batch, int64_t first, int64_t end);
int meliad_scorer_score_images(const meliad_scorer* scorer, const meliad_batch* batch);

/* The same on a CUDA device, where the library was built with CUDA: all pointers but parameters and batch are to its
   memory, stream is a cudaStream_t. Returns a cudaError_t. z and prototypes are half when half is not 0. */
size_t meliad_cuda_workspace_bytes(int64_t images, int64_t cells);
int meliad_cuda_score_patches(const meliad_parameters* parameters, const void* prototypes, int64_t count, int half,
                              const meliad_batch* batch, void* workspace, void* stream);

/* A camera frame in device memory, 8 bits a channel, and the size it is resized to. */
typedef struct {
  const uint8_t* pixels;
  int64_t pitch; /* bytes from row to row */
  int32_t height, width;
  int32_t is_bgr;
  int32_t model_height, model_width;
} meliad_frame;

/* The resize of the package on a CUDA device: bytes [height, width, 3] in the order red, green, blue, or normalised
   planes [3, height, width] of float or, when half is not 0, half. mean and deviation are on the host. */
int meliad_cuda_preprocess_bytes(const meliad_frame* frame, uint8_t* image, void* stream);
int meliad_cuda_preprocess_planes(const meliad_frame* frame, const float mean[3], const float deviation[3], int half,
                                  void* image, void* stream);

#ifdef __cplusplus
}
#endif

#endif
