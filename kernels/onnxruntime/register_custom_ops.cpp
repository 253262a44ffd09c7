// The one symbol of libmeliad_ort.so: ONNX Runtime calls it when the library is registered with a session.
#include "cpu_kernel.hpp"
#ifdef MELIAD_WITH_CUDA
#include "cuda_kernel.hpp"
#endif
#include "even_light.hpp"

namespace {

using namespace meliad::onnxruntime;

// The kernels take their threads from KernelContext_ParallelFor, which is as old as this.
constexpr uint32_t kOldestApiVersion = 17;

// Sessions keep pointers into this for as long as they live.
struct Library {
  explicit Library(uint32_t api_version) : on_cpu(api_version), even_light(api_version), domain("meliad") {
    domain.Add(&on_cpu);
    domain.Add(&even_light);
#ifdef MELIAD_WITH_CUDA
    domain.Add(&on_cuda);
#endif
  }

  PatchEntropyOp<CpuKernel> on_cpu;
  EvenLightOp even_light;
#ifdef MELIAD_WITH_CUDA
  PatchEntropyOp<CudaKernel> on_cuda{on_cpu.version};
#endif
  Ort::CustomOpDomain domain;
};

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL
RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* host) noexcept {
  // A host older than our headers refuses the newest version, so the ones before are tried.
  for (uint32_t version = ORT_API_VERSION; version >= kOldestApiVersion; --version) {
    const OrtApi* api = host->GetApi(version);
    if (api == nullptr) continue;
    Ort::InitApi(api);
    return as_status([&] {
      static Library library(version);
      Ort::UnownedSessionOptions(options).Add(library.domain);
    });
  }
  // No version in common, so not even an error can be made with its API: the oldest one always can.
  return host->GetApi(1)->CreateStatus(ORT_FAIL, "libmeliad_ort: this ONNX Runtime is older than 1.17; update it");
}
