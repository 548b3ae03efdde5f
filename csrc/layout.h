// Contiguous or channels_last: what a tensor is, and making one so. The same rule as reference.memory_format.
#pragma once

#include <vector>

#include "common.h"

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

// An uninitialised tensor like x, which is dense, in its layout.
inline Tensor empty_as(const Tensor& x) {
  return is_channels_last(x) ? torch::stable::empty_like(x) : torch::stable::new_empty(x, x.sizes());
}

// The same with another count of channels.
inline Tensor empty_with_channels(const Tensor& x, int64_t channels) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[1] = channels;
  if (!is_channels_last(x)) return torch::stable::new_empty(x, sizes);
  return torch::stable::empty(
      sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt, MemoryFormat::ChannelsLast);
}

}  // namespace ddpm_fast
