// Contiguous or channels_last: what a tensor is, and making one so. The same rule as reference.memory_format.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"

namespace ddpm_fast {

using torch::headeronly::MemoryFormat;

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto of_a = a.sizes(), of_b = b.sizes();
  return std::equal(of_a.begin(), of_a.end(), of_b.begin(), of_b.end());
}

// As a contiguous tensor of one channel or one pixel does too.
inline bool lies_channels_last(const Tensor& x) {
  if (x.dim() != 4) return false;
  const int64_t *sizes = x.sizes().data(), *strides = x.strides().data();
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

inline bool is_channels_last(const Tensor& x) { return !x.is_contiguous() && lies_channels_last(x); }

inline Tensor to_channels_last(const Tensor& x) {
  return lies_channels_last(x) ? x : torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

inline Tensor keep_layout(const Tensor& x) { return is_channels_last(x) ? x : as_contiguous(x); }

// x in the layout of `like`, which is dense
inline Tensor like_layout(const Tensor& x, const Tensor& like) {
  return is_channels_last(like) ? to_channels_last(x) : as_contiguous(x);
}

// An uninitialised tensor of x's dtype and device. torch::stable's empty functions look their operator up by
// name, and that takes longer than all the rest; this one is called.
inline Tensor empty_with_sizes(const Tensor& x, const int64_t* sizes, bool channels_last) {
  const int64_t dim = x.dim();
  int64_t order[4];  // how they lie in memory
  if (channels_last) {
    order[0] = sizes[0], order[1] = sizes[2], order[2] = sizes[3], order[3] = sizes[1];
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(
      x.get(), channels_last ? order : sizes, dim, nullptr, nullptr, nullptr, 0, nullptr, &handle));
  const Tensor dense(handle);
  if (!channels_last) return dense;
  const int64_t strides[4] = {order[1] * order[2] * order[3], 1, order[2] * order[3], order[3]};
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_as_strided(dense.get(), sizes, strides, &handle));
  return Tensor(handle);
}

// An uninitialised tensor like x, which is dense, in its layout.
inline Tensor empty_as(const Tensor& x) { return empty_with_sizes(x, x.sizes().data(), is_channels_last(x)); }

// The same with another count of channels.
inline Tensor empty_with_channels(const Tensor& x, int64_t channels) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[1] = channels;
  return empty_with_sizes(x, sizes.data(), is_channels_last(x));
}

}  // namespace ddpm_fast
