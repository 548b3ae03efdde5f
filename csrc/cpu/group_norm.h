// The CPU's norm as its callers see it, and what it shares with its gradient: operands by channel, and how an
// image is cut for the threads.
#pragma once

#include <algorithm>
#include <vector>

#include "../common.h"
#include "kernels.h"

namespace ddpm_fast {

struct GroupNormCall {
  Tensor x;
  OptionalTensor skip;  // the norm is of [x, skip]
  int64_t num_groups;
  OptionalTensor weight, bias;
  double eps;
  OptionalTensor add, scale, shift;
  bool silu = false, builds = false;  // builds: [x, skip] itself is wanted too
  bool folds = false;                 // only each channel's numbers are wanted; x is channels last then
};

struct GroupNormResult {
  OptionalTensor y, concat;  // like x but for their channels; or y is the numbers, float32 (B, 4, C)
};

GroupNormResult group_norm(const GroupNormCall& call);

// A (C,) or (B, C) operand as contiguous float32, or nothing.
class Channels {
 public:
  Channels(const char* name, const OptionalTensor& values, int64_t size) {
    if (!values) return;
    check(values->numel() == size, name, " must have ", size, " elements");
    values_ = as_contiguous(*values);
    const Dtype dtype = dtype_of(name, *values_);
    if (dtype == Dtype::kFloat) {
      data_ = static_cast<const float*>(values_->const_data_ptr());
    } else {
      converted_.resize(size);
      cpu::kernels().load(dtype, values_->const_data_ptr(), converted_.data(), size);
      data_ = converted_.data();
    }
  }

  const float* at(int64_t element) const { return data_ == nullptr ? nullptr : data_ + element; }

 private:
  OptionalTensor values_;
  std::vector<float> converted_;
  const float* data_ = nullptr;
};

constexpr int64_t kElementsPerThread = 8192;

// Channels last: how many channels of an image are one task, whole groups. An image goes whole to a thread
// where there are images enough; else its groups are split, by cache lines.
inline int64_t channels_together(int64_t batch, int64_t channels, int64_t group) {
  const int64_t threads = torch::stable::get_num_threads(), groups = channels / group;
  int64_t parts = 1;
  if (batch % threads != 0 && batch < 4 * threads) parts = std::min(threads, groups);
  while (parts > 1 && channels / parts < 32) --parts;
  return (groups + parts - 1) / parts * group;
}

}  // namespace ddpm_fast
