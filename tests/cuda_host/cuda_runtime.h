// CUDA's names for a host compiler: kernels as ordinary C++, run by runtime.cpp, one fibre a CUDA thread.
//
// No more than kernels like the project's are written in. Results have CUDA's meaning where CUDA promises
// one; where it promises nothing (a lane that is not in the mask, a barrier that some threads miss) the run
// ends with a message.
#pragma once

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static  // one block runs at a time

// ---- vectors ----

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define CUDA_HOST_VECTORS(T, name)                           \
  struct __align__(2 * sizeof(T)) name##2 { T x, y; };       \
  struct __align__(16) name##4 { T x, y, z, w; };            \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_HOST_VECTORS(int, int)
CUDA_HOST_VECTORS(unsigned, uint)
CUDA_HOST_VECTORS(float, float)
#undef CUDA_HOST_VECTORS

// ---- launching ----

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

namespace cuda_host {

inline bool descending = false;  // the order in which blocks and threads run

unsigned char* dynamic_shared();

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute, int value);
cudaError_t launch(const cudaLaunchConfig_t&, const void* kernel, const std::function<void()>& thread);

// Waits for the block; the number of threads that came with a true `predicate`.
int barrier(const char* operation, bool predicate);

// Waits for the lanes of `mask`; the value that lane `source` came with, and the lanes whose value was not 0.
struct Exchanged {
  uint64_t value;
  unsigned nonzero;
};
Exchanged exchange(const char* operation, unsigned mask, uint64_t value, int source);

int lane();
[[noreturn]] void fail(const char* operation, const char* what);  // names the thread, and ends the program

template <typename T>
T shuffle(const char* operation, unsigned mask, T value, int source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(operation, mask, bits, source).value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The first lane of this one's segment.
inline int segment(const char* operation, int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    fail(operation, "width is no power of 2 up to 32");
  return lane() & ~(width - 1);
}

}  // namespace cuda_host

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cuda_host::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <typename... Parameters, typename... Args>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Args&&... args) {
  const std::tuple<std::decay_t<Parameters>...> parameters(std::forward<Args>(args)...);
  return cuda_host::launch(
      *config, reinterpret_cast<const void*>(kernel), [&] { std::apply(kernel, parameters); });
}

// ---- inside a kernel ----

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

inline void __syncthreads() { cuda_host::barrier("__syncthreads", false); }
inline int __syncthreads_count(int predicate) {
  return cuda_host::barrier("__syncthreads_count", predicate != 0);
}
inline int __syncthreads_or(int predicate) {
  return cuda_host::barrier("__syncthreads_or", predicate != 0) > 0;
}
inline int __syncthreads_and(int predicate) {
  return cuda_host::barrier("__syncthreads_and", predicate == 0) == 0;
}

inline void __syncwarp(unsigned mask = ~0u) { cuda_host::exchange("__syncwarp", mask, 0, cuda_host::lane()); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_host::exchange("__ballot_sync", mask, predicate != 0, cuda_host::lane()).nonzero;
}
inline int __any_sync(unsigned mask, int predicate) {
  return cuda_host::exchange("__any_sync", mask, predicate != 0, cuda_host::lane()).nonzero != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return cuda_host::exchange("__all_sync", mask, predicate == 0, cuda_host::lane()).nonzero == 0;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = cuda_host::segment("__shfl_sync", width);
  return cuda_host::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int source = cuda_host::lane() ^ lanes, first = cuda_host::segment("__shfl_xor_sync", width);
  return cuda_host::shuffle(
      "__shfl_xor_sync", mask, value, source < first + width ? source : cuda_host::lane());
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int source = cuda_host::lane() - static_cast<int>(delta);
  const int first = cuda_host::segment("__shfl_up_sync", width);
  return cuda_host::shuffle("__shfl_up_sync", mask, value, source >= first ? source : cuda_host::lane());
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int source = cuda_host::lane() + static_cast<int>(delta);
  const int first = cuda_host::segment("__shfl_down_sync", width);
  return cuda_host::shuffle(
      "__shfl_down_sync", mask, value, source < first + width ? source : cuda_host::lane());
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, const T& value) {
  *to = value;
}
template <typename T>
void __stwt(T* to, const T& value) {
  *to = value;
}

[[noreturn]] inline void __trap() { cuda_host::fail("__trap", "called"); }

// ---- numbers ----

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __saturatef(float x) { return std::isnan(x) ? 0 : std::clamp(x, 0.0f, 1.0f); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

// Of floats as fminf and fmaxf: a NaN beside a number is ignored.
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return std::fmin(C(a), C(b));
  return std::min<C>(a, b);
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return std::fmax(C(a), C(b));
  return std::max<C>(a, b);
}
