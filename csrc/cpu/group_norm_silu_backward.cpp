// The gradient of group_norm_silu on the CPU: checks, layouts and threads around
// kernels/group_norm_silu_backward.h.
#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "../common.h"
#include "../layout.h"
#include "group_norm.h"

namespace ddpm_fast {
namespace {

// The gradient to an operand, in float32 by sample and channel until it is whole; nothing where there is
// none.
class Gradient {
 public:
  Gradient(const OptionalTensor& operand, int64_t size) : operand_(operand), by_sample_(operand ? size : 0) {}

  float* at(int64_t element) { return by_sample_.empty() ? nullptr : by_sample_.data() + element; }

  // In the operand's shape and dtype, summed over the samples where it has one row for them all; or empty.
  Tensor whole(const Tensor& x) {
    if (!operand_) return empty(x, {0});
    const Tensor to = empty(*operand_, operand_->sizes());
    const int64_t size = to.numel(), samples = static_cast<int64_t>(by_sample_.size()) / size;
    if (samples > 1) {
      std::vector<double> total(size);
      const float* from = by_sample_.data();
      for (int64_t b = 0; b < samples; ++b, from += size) {
        for (int64_t c = 0; c < size; ++c) total[c] += from[c];
      }
      std::copy(total.begin(), total.end(), by_sample_.begin());
    }
    const Dtype dtype = dtype_of("operand", to);
    cpu::kernels().store(dtype, by_sample_.data(), to.mutable_data_ptr(), size);
    return to;
  }

 private:
  // The sizes are those of one or two dimensions; see empty_with_sizes.
  template <typename Sizes>
  static Tensor empty(const Tensor& like, const Sizes& sizes) {
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(
        like.get(), sizes.data(), sizes.size(), nullptr, nullptr, nullptr, 0, nullptr, &handle));
    return Tensor(handle);
  }
  static Tensor empty(const Tensor& like, std::array<int64_t, 1> sizes) {
    return empty<std::array<int64_t, 1>>(like, sizes);
  }

  OptionalTensor operand_;
  std::vector<float> by_sample_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward_cpu(
    Tensor grad, Tensor x, int64_t num_groups, OptionalTensor weight, OptionalTensor bias, double eps,
    OptionalTensor add, OptionalTensor scale, OptionalTensor shift, bool silu) {
  const Dtype dtype = dtype_of("x", x);
  check(dtype != Dtype::kDouble, "x must be float32, bfloat16 or float16");
  check(x.dim() >= 2 && x.numel() > 0, "x must be (B, C, ...) and not empty");
  check_like("grad", grad, x, "x");
  const int64_t batch = x.size(0), channels = x.size(1), pixels = x.numel() / (batch * channels);
  check(num_groups > 0 && channels % num_groups == 0, "num_groups must divide the channels");
  const int64_t group = channels / num_groups, all = batch * channels;

  x = keep_layout(x);
  grad = like_layout(grad, x);
  Tensor grad_x = empty_as(x);
  const Channels weights("weight", weight, channels), biases("bias", bias, channels);
  const Channels adds("add", add, all), scales("scale", scale, all), shifts("shift", shift, all);
  Gradient to_weight(weight, all), to_bias(bias, all), to_add(add, all), to_scale(scale, all),
      to_shift(shift, all);
  const auto args = [&](int64_t b, int64_t c) {
    const int64_t k = b * channels + c;
    return cpu::GroupNormArgs{weights.at(c), biases.at(c), adds.at(k), scales.at(k), shifts.at(k), eps, silu};
  };
  const auto gradients = [&](int64_t b, int64_t c) {
    const int64_t k = b * channels + c;
    return cpu::GroupNormGradients{
        to_weight.at(k), to_bias.at(k), to_add.at(k), to_scale.at(k), to_shift.at(k)};
  };
  const auto scratch = [](int64_t width) {
    thread_local std::vector<double> doubles;
    const size_t needed = cpu::group_norm_backward_scratch(width) / 2;
    if (doubles.size() < needed) doubles.resize(needed);
    return reinterpret_cast<float*>(doubles.data());
  };
  const cpu::Kernels& kernels = cpu::kernels();

  if (is_channels_last(x) || pixels == 1) {
    const int64_t part = channels_together(batch, channels, group);
    const int64_t parts = (channels + part - 1) / part;
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (part * pixels));
    torch::stable::parallel_for(0, batch * parts, grain, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        const int64_t b = k / parts, c = k % parts * part, width = std::min(part, channels - c);
        const int64_t element = b * channels * pixels + c;
        kernels.group_norm_backward_nhwc(
            dtype, at(grad, dtype, element), at(x, dtype, element), mutable_at(grad_x, dtype, element),
            pixels, channels, width, group, args(b, c), gradients(b, c), scratch(width));
      }
    });
  } else {
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (group * pixels));
    torch::stable::parallel_for(0, batch * num_groups, grain, [&](int64_t first, int64_t last) {
      while (first < last) {  // groups of one image at a time
        const int64_t b = first / num_groups, groups = std::min(last, (b + 1) * num_groups) - first;
        const int64_t c = first % num_groups * group, element = first * group * pixels;
        kernels.group_norm_backward_nchw(
            dtype, at(grad, dtype, element), at(x, dtype, element), mutable_at(grad_x, dtype, element),
            pixels, group, groups, args(b, c), gradients(b, c), scratch(groups * group));
        first += groups;
      }
    });
  }
  return {grad_x,          to_weight.whole(x), to_bias.whole(x),
          to_add.whole(x), to_scale.whole(x),  to_shift.whole(x)};
}

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward_cpu));
}

}  // namespace
}  // namespace ddpm_fast
