// float16, which the compiler has.
#pragma once

#include "cuda_runtime.h"

struct __half {
  _Float16 value;
};
struct __align__(4) __half2 {
  __half x, y;
};

inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }

inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 x) { return __floats2half2_rn(x.x, x.y); }
