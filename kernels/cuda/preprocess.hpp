// A camera frame to model input in one pass on a CUDA device: the resize of meliad_edge/data/preprocess.py and, for
// engines that take floats, the normalisation. No intermediate image is in memory. reference/preprocess.py spells the
// weights out.
#pragma once

#include <cstdint>

#include "cuda.hpp"

namespace meliad::cuda {

struct Size {
  int32_t height, width;
};

// What happens to frames of one size on their way to the model; computed once per stream.
struct ResizePlan {
  Size frame;
  int32_t factor;  // squares of factor x factor pixels are averaged first; a power of two, 0 for impossible sizes
  Size averaged;   // size after that
  Size reduced;    // after area weights; the same where bilinear interpolation alone sees every pixel
  Size model;      // after bilinear interpolation
};

// The choice of to_model_input(). Sides are 1 to 32767 pixels and the factor at most 2048, so that positions and sums
// are exact in 32 bits.
ResizePlan plan_resize(Size frame, Size model);

enum class ChannelOrder : int32_t { kRgb, kBgr };

// Three interleaved channels of 8 bits in device memory, of the height and width of the plan. Fastest where the address
// and the pitch are multiples of 4.
struct Frame {
  const uint8_t* pixels;
  int64_t pitch;  // bytes from one row to the next; the last row may end with its last pixel
  ChannelOrder order;
};

// (value / 255 - mean) / deviation, in the order red, green, blue.
struct Normalisation {
  float mean[3], deviation[3];
};

// Enqueues the preprocessing of one frame on the stream: no allocation, no synchronisation. The image is one slot of a
// batch in device memory: RGB [height, width, 3], or normalised planes [3, height, width] of float or Half, made from
// the same bytes so that every engine sees what the model was fitted on. Returns cudaErrorInvalidValue for an
// impossible plan, a pitch shorter than a row or a deviation of 0.
cudaError_t preprocess(const ResizePlan& plan, const Frame& frame, uint8_t* image, cudaStream_t stream);
template <typename Element>
cudaError_t preprocess(const ResizePlan& plan, const Frame& frame, const Normalisation& normalisation, Element* image,
                       cudaStream_t stream);

}  // namespace meliad::cuda
