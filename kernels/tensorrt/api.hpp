// TensorRT's plugin interface as this library uses it: only its headers, so that one library serves every TensorRT
// from 10.0 on, and never thrown across.
#pragma once

#include <NvInferRuntime.h>

#include <exception>

namespace meliad::tensorrt {

// Where TensorRT wants our messages; it says so when it loads the library.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// Without a finder, or where it finds no logger, the message is lost: the streams of the host are not ours.
void log_error(const char* message) noexcept;

// Runs a piece of work. What it throws becomes a message, and the result what TensorRT takes for a failure.
template <typename Result, typename Work>
Result logged(Result failure, Work&& work) noexcept {
  try {
    return work();
  } catch (const std::exception& error) {
    log_error(error.what());
  } catch (...) {
    log_error("PatchEntropyScore: unknown error");
  }
  return failure;
}

}  // namespace meliad::tensorrt
