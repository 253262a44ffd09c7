// What the kernels need of CUDA: CUDA itself or, where MELIAD_CUDA_ON_CPU is defined, on_cpu.hpp, which executes the
// same source on the CPU, so that tests can run it where there is no GPU.
#pragma once

#ifdef MELIAD_CUDA_ON_CPU

#include "on_cpu.hpp"

#define MELIAD_SHARED(type, name) type& name = ::meliad::cuda::on_cpu::shared<type>(__LINE__)

#else

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

// An object in the shared memory of the block.
#define MELIAD_SHARED(type, name) __shared__ type name

namespace meliad::cuda {

using Half = __half;

#ifdef __CUDACC__
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = grid;
  configuration.blockDim = dim3(threads);
  configuration.stream = stream;
  return cudaLaunchKernelEx(&configuration, kernel, arguments...);
}
#endif

}  // namespace meliad::cuda

#endif
