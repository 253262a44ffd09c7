// TensorRT 11 gave loggers and their finder a base class, which moves log and findLogger in the virtual table. Which
// layout we meet is up to the TensorRT that loads us, not to the headers we are compiled with.
#include <cxxabi.h>

#include <atomic>
#include <typeinfo>

#include "api.hpp"

namespace meliad::tensorrt {

// Not in an unnamed namespace: the compiler would see that nothing here implements these functions, and call none.
namespace layouts {

struct NoBase {};  // TensorRT 10

template <typename Base>
struct Of {
  struct Logger : Base {
    virtual void log(nvinfer1::ILogger::Severity severity, const char* message) noexcept = 0;
  };
  struct Finder : Base {
    virtual Logger* findLogger() = 0;
  };
};

}  // namespace layouts

namespace {

template <typename Base>
void log_error_through(nvinfer1::ILoggerFinder* finder, const char* message) {
  auto* logger = reinterpret_cast<typename layouts::Of<Base>::Finder*>(finder)->findLogger();
  if (logger != nullptr) logger->log(nvinfer1::ILogger::Severity::kERROR, message);
}

bool is_versioned(const nvinfer1::ILoggerFinder& finder) {
  const std::type_info* type = &typeid(finder);
  while (const auto* derived = dynamic_cast<const abi::__si_class_type_info*>(type)) type = derived->__base_type;
  return *type == typeid(nvinfer1::IVersionedInterface);
}

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder = finder; }

void log_error(const char* message) noexcept {
  nvinfer1::ILoggerFinder* finder = logger_finder;
  if (finder == nullptr) return;
  try {
    if (is_versioned(*finder)) {
      log_error_through<nvinfer1::IVersionedInterface>(finder, message);
    } else {
      log_error_through<layouts::NoBase>(finder, message);
    }
  } catch (...) {  // not even what a finder throws is thrown across
  }
}

}  // namespace meliad::tensorrt
