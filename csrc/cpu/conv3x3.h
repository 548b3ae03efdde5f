// What a 3x3 convolution and its gradients share on the CPU.
#pragma once

#include "../common.h"
#include "kernels.h"

namespace ddpm_fast {

inline const float* floats(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }

// A dense weight (K, C, 3, 3).
template <typename T>
cpu::Conv3x3Weight<T> in_layout(T* first, int64_t channels, bool channels_last) {
  if (channels_last) return {first, 9 * channels, 1, channels};
  return {first, 9 * channels, 9, 1};
}

}  // namespace ddpm_fast
