// The inner loops of EvenLight on the CPU, which the compiler turns into vectors. even_light.cpp includes this file
// once per instruction set, hence no include guard: each time in another namespace, with MELIAD_TARGET as the attribute
// that compiles a function for that instruction set.

// Sums of at most kValuesPerSum bytes and of their squares, which 32 bits hold.
MELIAD_TARGET void add_up(const uint8_t* values, int64_t count, uint64_t& sum, uint64_t& squares) {
  uint32_t block_sum = 0, block_squares = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t value = values[i];
    block_sum += value;
    block_squares += value * value;
  }
  sum += block_sum;
  squares += block_squares;
}

// Takes interleaved colours apart and gives each its light.
MELIAD_TARGET void write_planes(const uint8_t* frame, int64_t count, const Light& light,
                                const std::array<float*, kColours>& planes) {
  const Light copy = light;  // which no plane can overlap
  const std::array<float*, kColours> to = planes;
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 3
    for (int colour = 0; colour < kColours; ++colour) {
      const Light::Line& line = copy.lines[colour];
      float value = (float(frame[i * kColours + colour]) - copy.centre) * line.gain + line.offset;
      value = value < line.smallest ? line.smallest : value;
      to[colour][i] = value > line.largest ? line.largest : value;
    }
  }
}
