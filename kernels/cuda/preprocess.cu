// One kernel that reads the frame from memory about once: a block reduces what its tile of the model input needs to
// samples (averages over squares, then area weights), keeps them in shared memory and interpolates between them.
// reference/preprocess.py spells the weights out.
//
// Roundings are those of OpenCV's C++ code: averages over 2 x 2 pixels round half up, larger averages and area weights
// half to even, and bilinear interpolation has weights of 11 bits and cuts the two products of its last step to a
// quarter of a grey level, which makes it 1/8 darker on average. Two differ, both seldom and by one grey level: sums of
// area weights are exact here, which decides ties, and a bilinear weight may be 1/2048 off because OpenCV finds it from
// a position in single precision. That is 1 value in 5000 for 1024 x 768 to 224 x 224 and none for 1280 x 720,
// 1920 x 1080 and 640 x 480 to 256 x 256.
#include <numeric>

#include "preprocess.hpp"

namespace meliad::cuda {
namespace {

// A block of 8 warps makes a tile of model input, a pixel per thread. At most a factor of two is left to bilinear
// interpolation, so twice as many samples per side always suffice.
constexpr int kRows = 8, kColumns = 32, kThreads = kRows * kColumns;
// Blocks on a multiprocessor at a time: as many as their registers allow without spilling into memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kResidentBlocks = 4;
#else
constexpr int kResidentBlocks = 5;
#endif
constexpr int kSampleRows = 2 * kRows, kSampleColumns = 2 * kColumns;
constexpr int kWeightBits = 11;  // of a bilinear weight
constexpr int32_t kLargestSide = 32767, kLargestFactor = 2048;
constexpr double kBilinearLimit = 2, kSmallestShare = 0.9;  // as in preprocess.py

template <typename Output>
struct Problem {
  ResizePlan plan;
  Frame frame;
  Output output;
  int area_bits;  // log2 of factor * factor
  // In the finest common unit of the averaged and the reduced size: a sample covers `window` units, a pixel `pixel`.
  // Sums are then whole numbers, small enough for most sizes to be exact in single precision.
  Size window, pixel;
};

// The two samples that a pixel of the model lies between, along one axis.
struct Neighbours {
  int first, second;
  int weight;  // of the second, of 2048
};

// Centres of pixels coincide, so pixel i lies at (i + 1/2) samples / pixels - 1/2: a whole number of 1 / (2 pixels).
__device__ Neighbours neighbours(int i, int samples, int pixels) {
  const unsigned position = unsigned((2 * i + 1) * samples + pixels);  // one sample further right, so not negative
  const unsigned unit = 2 * unsigned(pixels);
  const int before = int(position / unit) - 1;
  const int weight = int((((position % unit) << (kWeightBits + 1)) + unit) / (2 * unit));
  // A border sample is repeated. With weight 0 the next one need not be read.
  return {max(before, 0), weight == 0 ? max(before, 0) : min(before + 1, samples - 1), weight};
}

// The pixels that a sample covers along one axis, at least in part; in units, see Problem.
struct Window {
  int begin, end, pixel;

  __device__ Window(int i, int window, int pixel) : begin(i * window), end(begin + window), pixel(pixel) {}
  __device__ int first() const { return int(unsigned(begin) / unsigned(pixel)); }
  __device__ bool reaches(int i) const { return i * pixel < end; }
  __device__ int weight(int i) const { return min(end, (i + 1) * pixel) - max(begin, i * pixel); }
};

// Averages a square of the frame. Three words of n bytes hold n pixels.
template <typename Word, typename Output>
__device__ void average(const Problem<Output>& problem, int row, int column, int (&channels)[3]) {
  constexpr int kBytes = sizeof(Word);
  const Frame& frame = problem.frame;
  const int factor = problem.plan.factor;
  const uint8_t* pixels = frame.pixels + int64_t(row) * factor * frame.pitch + int64_t(column) * factor * 3;
  unsigned sums[3] = {};
#pragma unroll 1
  for (int j = 0; j < factor; j += kBytes) {
#pragma unroll 2  // so many rows are under way at once
    for (int i = 0; i < factor; ++i) {
      const Word* words = reinterpret_cast<const Word*>(pixels + i * frame.pitch + 3 * j);
      const Word group[3] = {words[0], words[1], words[2]};
#pragma unroll
      for (int byte = 0; byte < 3 * kBytes; ++byte) {
        sums[byte % 3] += group[byte / kBytes] >> (8 * (byte % kBytes)) & 255;
      }
    }
  }
  const unsigned half = (1u << problem.area_bits) / 2;
  for (int channel = 0; channel < 3; ++channel) {
    const bool half_up = problem.plan.factor <= 2 || sums[channel] >> problem.area_bits & 1;
    channels[channel] = int((sums[channel] + half - (half_up ? 0 : 1)) >> problem.area_bits);
  }
}

// A pixel of the reduced size, its channels in the three lower bytes.
template <typename Word, typename Output>
__device__ uint32_t sample(const Problem<Output>& problem, int row, int column) {
  const Window rows(row, problem.window.height, problem.pixel.height);
  const Window columns(column, problem.window.width, problem.pixel.width);
  float sums[3] = {};
  for (int i = rows.first(); rows.reaches(i); ++i) {
    int row_sums[3] = {};
    for (int j = columns.first(); columns.reaches(j); ++j) {
      const int weight = columns.weight(j);
      int channels[3];
      average<Word>(problem, i, j, channels);
      for (int channel = 0; channel < 3; ++channel) row_sums[channel] += weight * channels[channel];
    }
    const float weight = float(rows.weight(i));
    for (int channel = 0; channel < 3; ++channel) sums[channel] += weight * float(row_sums[channel]);
  }
  const float units = float(problem.window.height) * float(problem.window.width);
  uint32_t packed = 0;
  for (int channel = 0; channel < 3; ++channel) {
    packed |= uint32_t(rintf(sums[channel] / units)) << (8 * channel);  // a product with 1 / units would break ties
  }
  return packed;
}

// Between four samples.
__device__ int interpolate(int top_left, int top_right, int bottom_left, int bottom_right, int weight_right,
                           int weight_bottom) {
  constexpr int kOne = 1 << kWeightBits;
  const int top = (kOne - weight_right) * top_left + weight_right * top_right;
  const int bottom = (kOne - weight_right) * bottom_left + weight_right * bottom_right;
  return ((((kOne - weight_bottom) * (top >> 4)) >> 16) + ((weight_bottom * (bottom >> 4)) >> 16) + 2) >> 2;
}

struct Interleaved {
  uint8_t* image;  // [height, width, 3]

  __device__ void store(const Size& size, int row, int column, const int (&rgb)[3]) const {
    uint8_t* pixel = image + (int64_t(row) * size.width + column) * 3;
    for (int channel = 0; channel < 3; ++channel) pixel[channel] = uint8_t(rgb[channel]);
  }
};

template <typename Element>
struct Planes {
  Element* image;  // [3, height, width]
  float scale[3], shift[3];

  __device__ void store(const Size& size, int row, int column, const int (&rgb)[3]) const {
    for (int channel = 0; channel < 3; ++channel) {
      image[(int64_t(channel) * size.height + row) * size.width + column] =
          Element(float(rgb[channel]) * scale[channel] + shift[channel]);
    }
  }
};

struct Tile {
  Neighbours vertical[kRows], horizontal[kColumns];
  uint32_t samples[kSampleRows][kSampleColumns];
};

// Grid: tiles of columns, tiles of rows.
template <typename Word, typename Output>
__global__ void __launch_bounds__(kThreads, kResidentBlocks) preprocess_tile(Problem<Output> problem) {
  MELIAD_SHARED(Tile, tile);
  const Size reduced = problem.plan.reduced, model = problem.plan.model;
  const int thread = int(threadIdx.x);
  const int first_row = int(blockIdx.y) * kRows, first_column = int(blockIdx.x) * kColumns;
  if (thread < kRows) {
    tile.vertical[thread] = neighbours(min(first_row + thread, model.height - 1), reduced.height, model.height);
  } else if (thread < kRows + kColumns) {
    const int i = thread - kRows;
    tile.horizontal[i] = neighbours(min(first_column + i, model.width - 1), reduced.width, model.width);
  }
  __syncthreads();
  const int top = tile.vertical[0].first, bottom = tile.vertical[kRows - 1].second;
  const int left = tile.horizontal[0].first, right = tile.horizontal[kColumns - 1].second;
  const int sample_columns = right - left + 1;
  for (int i = thread; i < (bottom - top + 1) * sample_columns; i += kThreads) {
    const int row = i / sample_columns, column = i % sample_columns;
    tile.samples[row][column] = sample<Word>(problem, top + row, left + column);
  }
  __syncthreads();

  const int row = first_row + thread / kColumns, column = first_column + thread % kColumns;
  if (row >= model.height || column >= model.width) return;
  const Neighbours vertical = tile.vertical[thread / kColumns], horizontal = tile.horizontal[thread % kColumns];
  const uint32_t top_left = tile.samples[vertical.first - top][horizontal.first - left];
  const uint32_t top_right = tile.samples[vertical.first - top][horizontal.second - left];
  const uint32_t bottom_left = tile.samples[vertical.second - top][horizontal.first - left];
  const uint32_t bottom_right = tile.samples[vertical.second - top][horizontal.second - left];
  int rgb[3];
  for (int channel = 0; channel < 3; ++channel) {
    const int shift = 8 * (problem.frame.order == ChannelOrder::kBgr ? 2 - channel : channel);
    rgb[channel] = interpolate(top_left >> shift & 255, top_right >> shift & 255, bottom_left >> shift & 255,
                               bottom_right >> shift & 255, horizontal.weight, vertical.weight);
  }
  problem.output.store(model, row, column, rgb);
}

template <typename Output>
cudaError_t enqueue(const ResizePlan& plan, const Frame& frame, const Output& output, cudaStream_t stream) {
  if (plan.factor == 0 || frame.pitch < 3 * int64_t(plan.frame.width)) return cudaErrorInvalidValue;
  int area_bits = 0;
  while (plan.factor >> (area_bits / 2 + 1) != 0) area_bits += 2;
  const Size& averaged = plan.averaged;
  const Size& reduced = plan.reduced;
  const int32_t rows = std::gcd(averaged.height, reduced.height), columns = std::gcd(averaged.width, reduced.width);
  const Problem<Output> problem = {plan,
                                   frame,
                                   output,
                                   area_bits,
                                   {averaged.height / rows, averaged.width / columns},
                                   {reduced.height / rows, reduced.width / columns}};
  const dim3 grid(unsigned((plan.model.width + kColumns - 1) / kColumns),
                  unsigned((plan.model.height + kRows - 1) / kRows));
  // Squares start at multiples of their size, so they are read in the largest words that divide everything.
  const uint64_t divisible = reinterpret_cast<uintptr_t>(frame.pixels) | uint64_t(frame.pitch) | uint64_t(plan.factor);
  if (divisible % 4 == 0) return launch(preprocess_tile<uint32_t, Output>, grid, kThreads, stream, problem);
  if (divisible % 2 == 0) return launch(preprocess_tile<uint16_t, Output>, grid, kThreads, stream, problem);
  return launch(preprocess_tile<uint8_t, Output>, grid, kThreads, stream, problem);
}

}  // namespace

ResizePlan plan_resize(Size frame, Size model) {
  const auto fits = [](int32_t side) { return side >= 1 && side <= kLargestSide; };
  if (!fits(frame.height) || !fits(frame.width) || !fits(model.height) || !fits(model.width)) return {};
  int32_t factor = 1;
  while (frame.height % (2 * factor) == 0 && frame.width % (2 * factor) == 0 &&
         frame.height >= 2 * factor * kSmallestShare * model.height &&
         frame.width >= 2 * factor * kSmallestShare * model.width) {
    factor *= 2;
  }
  if (factor > kLargestFactor) return {};
  ResizePlan plan = {frame, factor, {frame.height / factor, frame.width / factor}, {}, model};
  plan.reduced = plan.averaged;
  if (plan.averaged.height > kBilinearLimit * model.height || plan.averaged.width > kBilinearLimit * model.width) {
    const auto smaller = [](int32_t a, int32_t b) { return a < b ? a : b; };
    plan.reduced = {smaller(plan.averaged.height, model.height), smaller(plan.averaged.width, model.width)};
  }
  return plan;
}

cudaError_t preprocess(const ResizePlan& plan, const Frame& frame, uint8_t* image, cudaStream_t stream) {
  return enqueue(plan, frame, Interleaved{image}, stream);
}

template <typename Element>
cudaError_t preprocess(const ResizePlan& plan, const Frame& frame, const Normalisation& normalisation, Element* image,
                       cudaStream_t stream) {
  Planes<Element> planes = {image, {}, {}};
  for (int channel = 0; channel < 3; ++channel) {
    const double deviation = normalisation.deviation[channel];
    if (deviation == 0) return cudaErrorInvalidValue;
    planes.scale[channel] = float(1 / (255 * deviation));
    planes.shift[channel] = float(-normalisation.mean[channel] / deviation);
  }
  return enqueue(plan, frame, planes, stream);
}

template cudaError_t preprocess(const ResizePlan&, const Frame&, const Normalisation&, float*, cudaStream_t);
template cudaError_t preprocess(const ResizePlan&, const Frame&, const Normalisation&, Half*, cudaStream_t);

}  // namespace meliad::cuda
