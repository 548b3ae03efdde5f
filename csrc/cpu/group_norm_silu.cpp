// group_norm_silu on the CPU: checks, layouts and threads around kernels/group_norm_silu.h.
#include <algorithm>
#include <vector>

#include "../common.h"
#include "kernels.h"
#include "layout.h"

namespace ddpm_fast {
namespace {

// A (C,) or (B, C) operand as contiguous float32, or nothing.
class Channels {
 public:
  Channels(const char* name, const OptionalTensor& values, int64_t size) {
    if (!values) return;
    check(values->numel() == size, name, " must have ", size, " elements");
    values_ = as_contiguous(*values);
    const cpu::Dtype dtype = dtype_of(name, *values_);
    if (dtype == cpu::Dtype::kFloat) {
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

Tensor group_norm_silu_cpu(
    Tensor x, int64_t num_groups, OptionalTensor weight, OptionalTensor bias, double eps, OptionalTensor add,
    OptionalTensor scale, OptionalTensor shift, bool silu) {
  const cpu::Dtype dtype = dtype_of("x", x);
  check(dtype != cpu::Dtype::kDouble, "x must be float32, bfloat16 or float16");
  check(x.dim() >= 2 && x.numel() > 0, "x must be (B, C, ...) and not empty");
  const int64_t batch = x.size(0), channels = x.size(1), pixels = x.numel() / (batch * channels);
  check(num_groups > 0 && channels % num_groups == 0, "num_groups must divide the channels");
  const int64_t group = channels / num_groups;

  const bool channels_last = is_channels_last(x);
  x = keep_layout(x);
  Tensor y = empty_as(x);
  const Channels weights("weight", weight, channels), biases("bias", bias, channels);
  const Channels adds("add", add, batch * channels), scales("scale", scale, batch * channels);
  const Channels shifts("shift", shift, batch * channels);
  const auto args = [&](int64_t b, int64_t c) {
    const int64_t k = b * channels + c;
    return cpu::GroupNormArgs{weights.at(c), biases.at(c), adds.at(k), scales.at(k), shifts.at(k), eps, silu};
  };
  const cpu::Kernels& kernels = cpu::kernels();
  constexpr int64_t kElementsPerThread = 8192;

  if (!channels_last) {
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (group * pixels));
    torch::stable::parallel_for(0, batch * num_groups, grain, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        const int64_t element = k * group * pixels;
        kernels.group_norm_nchw(
            dtype, at(x, dtype, element), mutable_at(y, dtype, element), pixels, group,
            args(k / num_groups, k % num_groups * group));
      }
    });
    return y;
  }

  // An image goes whole to a thread where there are images enough; else its groups are split, by cache lines.
  const int64_t threads = torch::stable::get_num_threads();
  int64_t parts = 1;
  if (batch % threads != 0 && batch < 4 * threads) parts = std::min(threads, num_groups);
  while (parts > 1 && channels / parts < 32) --parts;
  const int64_t part = (num_groups + parts - 1) / parts * group;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (part * pixels));
  torch::stable::parallel_for(0, batch * parts, grain, [&](int64_t first, int64_t last) {
    thread_local std::vector<double> scratch;
    for (int64_t k = first; k < last; ++k) {
      const int64_t b = k / parts, c = k % parts * part, width = std::min(part, channels - c);
      if (width <= 0) continue;
      const size_t needed = cpu::group_norm_scratch(width) / 2;
      if (scratch.size() < needed) scratch.resize(needed);
      const int64_t element = b * channels * pixels + c;
      kernels.group_norm_nhwc(
          dtype, at(x, dtype, element), mutable_at(y, dtype, element), pixels, channels, width, group,
          args(b, c), reinterpret_cast<float*>(scratch.data()));
    }
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) { m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu_cpu)); }

}  // namespace
}  // namespace ddpm_fast
