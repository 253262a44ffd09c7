// Preprocesses frames from standard input with the CUDA kernel, executed on the CPU, and writes the middle slot of a
// batch of three, with its neighbours, to standard output. The sanitizers this file is compiled with watch the ends of
// the frame and of the batch.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../kernels/cuda/preprocess.hpp"

namespace {

using namespace meliad::cuda;

struct Header {
  Size frame, model;
  int64_t pitch;
  int32_t offset;  // of the frame from an aligned address
  ChannelOrder order;
  Normalisation normalisation;
};

template <typename Value>
std::vector<Value> read(size_t count) {
  std::vector<Value> values(count);
  if (std::fread(values.data(), sizeof(Value), count, stdin) != count) std::exit(2);
  return values;
}

cudaError_t run(const ResizePlan& plan, const Frame& frame, const Normalisation&, uint8_t* image) {
  return preprocess(plan, frame, image, nullptr);
}

template <typename Element>
cudaError_t run(const ResizePlan& plan, const Frame& frame, const Normalisation& normalisation, Element* image) {
  return preprocess(plan, frame, normalisation, image, nullptr);
}

template <typename Element>
int run(const Header& header, const std::vector<uint8_t>& bytes) {
  const size_t elements = size_t(header.model.height) * size_t(header.model.width) * 3;
  const std::vector<uint8_t> canaries(3 * elements * sizeof(Element), 0xA5);
  std::vector<Element> batch(3 * elements);
  std::memcpy(batch.data(), canaries.data(), canaries.size());
  const Frame frame = {bytes.data() + header.offset, header.pitch, header.order};
  const cudaError_t error =
      run(plan_resize(header.frame, header.model), frame, header.normalisation, batch.data() + elements);
  std::fwrite(batch.data(), sizeof(Element), batch.size(), stdout);
  return error == cudaSuccess ? 0 : 3;
}

}  // namespace

int main(int, char** arguments) {
  const std::string output = arguments[1];
  const Header header = read<Header>(1)[0];
  if (output == "plan") {
    const ResizePlan plan = plan_resize(header.frame, header.model);
    std::fwrite(&plan, sizeof plan, 1, stdout);
    return 0;
  }
  // Nothing behind the last pixel.
  const auto bytes = read<uint8_t>(header.offset + (header.frame.height - 1) * header.pitch + 3 * header.frame.width);
  if (output == "half") return run<Half>(header, bytes);
  return output == "float" ? run<float>(header, bytes) : run<uint8_t>(header, bytes);
}
