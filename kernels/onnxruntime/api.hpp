// ONNX Runtime's C++ API as this library uses it: bound when the host registers us, and never thrown across.
#pragma once

// The host hands us its API table; nothing is linked.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <exception>
#include <stdexcept>

namespace meliad::onnxruntime {

// Runs a piece of work and turns whatever it throws into the status that the C interface expects.
template <typename Work>
OrtStatusPtr as_status(Work&& work) noexcept {
  try {
    work();
    return nullptr;
  } catch (const Ort::Exception& error) {
    return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
  } catch (const std::invalid_argument& error) {
    return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
  } catch (...) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, "meliad: unknown error");
  }
}

}  // namespace meliad::onnxruntime
