// What a kernel needs of the machine beyond CUDA's own words: launching, and memory shared by a block.
//
// The kernels are CUDA C++ that a host compiler takes too, given headers of CUDA's names: so tests run them,
// under sanitizers, where there is no device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace ddpm_fast::cuda {

// kernel<<<grid, block, shared_bytes, stream>>>(args...)
template <typename... Parameters, typename... Args>
void launch(
    void (*kernel)(Parameters...), int64_t grid, int64_t block, int64_t shared_bytes, cudaStream_t stream,
    Args&&... args) {
  if (grid > 0x7fffffff) throw std::runtime_error("a CUDA grid has less than 2^31 blocks: too many elements");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA kernel not launched: ") + cudaGetErrorString(error));
  }
}

#ifdef __CUDACC__
// The block's `shared_bytes`, 16-byte aligned.
template <typename T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}
#else
template <typename T>
inline T* dynamic_shared() {
  return reinterpret_cast<T*>(cuda_host::dynamic_shared());
}
#endif

}  // namespace ddpm_fast::cuda
