// x_t = sqrt(alphas_cumprod[t]) x0 + sqrt(1 - alphas_cumprod[t]) noise, for one sample's span.
// Reads 2 and writes 1 element of T; float32 arithmetic for float, float64 for double.
#pragma once

#include <cstdint>

namespace ddpm_fast::cpu {
namespace {

template <typename T>
void axpby(double a, const T* x, double b, const T* y, T* out, int64_t n) {
  const T a_ = static_cast<T>(a), b_ = static_cast<T>(b);
  for (int64_t k = 0; k < n; ++k) out[k] = a_ * x[k] + b_ * y[k];
}

}  // namespace
}  // namespace ddpm_fast::cpu
