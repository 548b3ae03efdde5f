// Contiguous or channels_last: what a tensor is, and making one so. The same rule as reference.memory_format.
#pragma once

#include "../common.h"

namespace ddpm_fast {

using torch::headeronly::MemoryFormat;

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

inline bool is_channels_last(const Tensor& x) {
  if (x.dim() != 4 || x.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

inline Tensor to_channels_last(const Tensor& x) {
  return is_channels_last(x) ? x : torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

inline Tensor keep_layout(const Tensor& x) { return is_channels_last(x) ? x : as_contiguous(x); }

// x in the layout of `like`, which is dense
inline Tensor like_layout(const Tensor& x, const Tensor& like) {
  return is_channels_last(like) ? to_channels_last(x) : as_contiguous(x);
}

// An uninitialised tensor like x, which is dense, in its strides.
inline Tensor empty_as(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int32_t dtype, device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_index));
  AtenTensorHandle empty;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      x.dim(), sizes.data(), strides.data(), dtype, device_type, device_index, &empty));
  return Tensor(empty);
}

}  // namespace ddpm_fast
