// Elements in memory and in registers: V of them in one access of 16 bytes, or one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "../dtype.h"

namespace ddpm_fast::cuda {

template <typename T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

template <typename T, int V>
using Raw = std::conditional_t<V == 1, T, uint4>;

template <int V, typename T>
__device__ __forceinline__ Raw<T, V> load(const T* from) {
  static_assert(V == 1 || V == kWide<T>);
  if constexpr (V == 1) {
    return *from;
  } else {
    return *reinterpret_cast<const uint4*>(from);
  }
}

template <int V, typename T>
__device__ __forceinline__ void store(T* to, const Raw<T, V>& raw) {
  if constexpr (V == 1) {
    *to = raw;
  } else {
#ifdef __CUDA_ARCH__  // spelled out: nvcc cuts some such stores into four
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(raw.x),
                 "r"(raw.y), "r"(raw.z), "r"(raw.w)
                 : "memory");
#else
    *reinterpret_cast<uint4*>(to) = raw;
#endif
  }
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

template <typename To, typename From>  // std::bit_cast is C++20
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T, int V>
__device__ __forceinline__ void unpack(const Raw<T, V>& raw, float (&x)[V]) {
  if constexpr (V == 1) {
    x[0] = to_float(raw);
  } else {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (std::is_same_v<T, float>) {
        x[k] = __uint_as_float(words[k]);
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        x[2 * k] = __uint_as_float(words[k] << 16);
        x[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
      } else {
        const float2 both = __half22float2(bits_as<__half2>(words[k]));
        x[2 * k] = both.x;
        x[2 * k + 1] = both.y;
      }
    }
  }
}

template <typename T, int V>
__device__ __forceinline__ Raw<T, V> pack(const float (&x)[V]) {
  if constexpr (V == 1) {
    return from_float<T>(x[0]);
  } else {
    uint32_t words[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (std::is_same_v<T, float>) {
        words[k] = __float_as_uint(x[k]);
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        words[k] = bits_as<uint32_t>(__floats2bfloat162_rn(x[2 * k], x[2 * k + 1]));
      } else {
        words[k] = bits_as<uint32_t>(__floats2half2_rn(x[2 * k], x[2 * k + 1]));
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// f(T()) for the type that a dtype names
template <typename F>
void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat:
      return f(float{});
    case Dtype::kBFloat16:
      return f(__nv_bfloat16{});
    case Dtype::kHalf:
      return f(__half{});
    default:
      throw std::invalid_argument("a CUDA kernel takes float32, bfloat16 or float16");
  }
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace ddpm_fast::cuda
