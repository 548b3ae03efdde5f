// group_norm_silu and group_norm_silu_concat on the CPU: checks, layouts and threads around
// kernels/group_norm_silu.h.
#include <algorithm>
#include <tuple>
#include <vector>

#include "../common.h"
#include "../layout.h"
#include "group_norm.h"
#include "program.h"
#include "team.h"

namespace ddpm_fast {

namespace {

// Of an x that is known to be one.
void group_norm_into(const GroupNormCall& call, const Tensor& y, const OptionalTensor& concat) {
  Tensor x = call.x;
  const bool folds = call.folds;
  OptionalTensor skip = call.skip;
  const int64_t num_groups = call.num_groups;
  const Dtype dtype = dtype_of("x", x);
  const int64_t batch = x.size(0), from_x = x.size(1), pixels = x.numel() / (batch * from_x);
  const int64_t from_skip = skip ? skip->size(1) : 0, channels = from_x + from_skip;
  check(num_groups > 0 && channels % num_groups == 0, "num_groups must divide the channels");
  const int64_t group = channels / num_groups;

  check(!folds || x.dim() == 4, "x must be (B, C, H, W)");
  const bool channels_last = folds || is_channels_last(x);
  x = folds ? to_channels_last(x) : keep_layout(x);
  if (skip) {
    check(
        skip->scalar_type() == x.scalar_type() && skip->dim() == x.dim() && skip->size(0) == batch &&
            skip->numel() == batch * from_skip * pixels && from_skip > 0,
        "skip must be like x but for its channels");
    for (int64_t d = 2; d < x.dim(); ++d) {
      check(skip->size(d) == x.size(d), "skip must be like x but for its channels");
    }
    skip = folds ? to_channels_last(*skip) : like_layout(*skip, x);
  }
  const Channels weights("weight", call.weight, channels), biases("bias", call.bias, channels);
  const Channels adds("add", call.add, batch * channels), scales("scale", call.scale, batch * channels);
  const Channels shifts("shift", call.shift, batch * channels);
  const auto args = [&](int64_t b, int64_t c) {
    const int64_t k = b * channels + c;
    return cpu::GroupNormArgs{weights.at(c), biases.at(c), adds.at(k), scales.at(k),
                              shifts.at(k),  call.eps,     call.silu};
  };
  // Channels [c, c + width) of an image: what lies in x, and what in skip.
  const int64_t channel_step = channels_last ? 1 : pixels;
  const auto sources = [&](int64_t b, int64_t c, int64_t width) {
    const int64_t split = std::clamp<int64_t>(from_x - c, 0, width);
    const int64_t beyond = std::max<int64_t>(c - from_x, 0);
    cpu::GroupNormSources from = {};
    if (split > 0) from.of[0] = {at(x, dtype, b * from_x * pixels + c * channel_step), split, from_x};
    if (split < width) {
      const int64_t element = b * from_skip * pixels + beyond * channel_step;
      from.of[1] = {at(*skip, dtype, element), width - split, from_skip};
    }
    return from;
  };
  const auto into = [&](int64_t element) { return mutable_at(y, dtype, element); };
  const auto copied = [&](int64_t element) { return concat ? mutable_at(*concat, dtype, element) : nullptr; };
  const cpu::Kernels& kernels = cpu::kernels();

  if (!channels_last) {
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (group * pixels));
    parallel_for(0, batch * num_groups, grain, [&](int64_t first, int64_t last) {
      while (first < last) {  // groups of one image at a time
        const int64_t b = first / num_groups, groups = std::min(last, (b + 1) * num_groups) - first;
        const int64_t c = first % num_groups * group, element = first * group * pixels;
        kernels.group_norm_nchw(
            dtype, sources(b, c, groups * group), into(element), copied(element), pixels, group, groups,
            args(b, c));
        first += groups;
      }
    });
    return;
  }

  const int64_t part = channels_together(batch, channels, group);
  const int64_t parts = (channels + part - 1) / part;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (part * pixels));
  parallel_for(0, batch * parts, grain, [&](int64_t first, int64_t last) {
    thread_local std::vector<double> scratch;
    for (int64_t k = first; k < last; ++k) {
      const int64_t b = k / parts, c = k % parts * part, width = std::min(part, channels - c);
      const size_t needed = cpu::group_norm_scratch(width) / 2;
      if (scratch.size() < needed) scratch.resize(needed);
      auto* const memory = reinterpret_cast<float*>(scratch.data());
      if (folds) {
        float* const to = static_cast<float*>(y.mutable_data_ptr()) + cpu::kFoldRows * b * channels + c;
        kernels.group_norm_fold(
            dtype, sources(b, c, width), to, channels, pixels, width, group, args(b, c), memory);
        continue;
      }
      const int64_t element = b * channels * pixels + c;
      kernels.group_norm_nhwc(
          dtype, sources(b, c, width), into(element), copied(element), pixels, channels, width, group,
          args(b, c), memory);
    }
  });
}

}  // namespace

GroupNormResult group_norm(const GroupNormCall& call) {
  const Tensor& x = call.x;
  check(dtype_of("x", x) != Dtype::kDouble, "x must be float32, bfloat16 or float16");
  check(x.dim() >= 2 && x.numel() > 0, "x must be (B, C, ...) and not empty");
  const int64_t channels = x.size(1) + (call.skip ? call.skip->size(1) : 0);
  GroupNormResult result = {empty_with_channels(x, channels), {}};
  if (call.builds) result.concat = empty_with_channels(x, channels);
  group_norm_into(call, *result.y, result.concat);
  return result;
}

namespace {

Tensor group_norm_silu_cpu(
    Tensor x, int64_t num_groups, OptionalTensor weight, OptionalTensor bias, double eps, OptionalTensor add,
    OptionalTensor scale, OptionalTensor shift, bool silu) {
  const GroupNormCall call{x, {}, num_groups, weight, bias, eps, add, scale, shift, silu, /*builds=*/false};
  return *group_norm(call).y;
}

std::tuple<Tensor, Tensor> group_norm_silu_concat_cpu(
    Tensor x, Tensor skip, int64_t num_groups, OptionalTensor weight, OptionalTensor bias, double eps,
    OptionalTensor add, OptionalTensor scale, OptionalTensor shift, bool silu, bool concat) {
  const GroupNormCall call{x, skip, num_groups, weight, bias, eps, add, scale, shift, silu, concat};
  const GroupNormResult result = group_norm(call);
  return {*result.y, concat ? *result.concat : torch::stable::new_empty(*result.y, {0})};
}

void group_norm_silu_into(
    Tensor x, int64_t num_groups, OptionalTensor weight, OptionalTensor bias, double eps, OptionalTensor add,
    OptionalTensor scale, OptionalTensor shift, bool silu, Tensor y) {
  group_norm_into({x, {}, num_groups, weight, bias, eps, add, scale, shift, silu}, y, {});
}

void group_norm_silu_concat_into(
    Tensor x, Tensor skip, int64_t num_groups, OptionalTensor weight, OptionalTensor bias, double eps,
    OptionalTensor add, OptionalTensor scale, OptionalTensor shift, bool silu, bool builds, Tensor y,
    Tensor concat) {
  const OptionalTensor built = builds ? OptionalTensor(concat) : std::nullopt;
  group_norm_into({x, skip, num_groups, weight, bias, eps, add, scale, shift, silu, builds}, y, built);
}

void group_norm_fold_into(
    Tensor x, OptionalTensor skip, int64_t num_groups, OptionalTensor weight, OptionalTensor bias, double eps,
    OptionalTensor add, OptionalTensor scale, OptionalTensor shift, Tensor folded) {
  GroupNormCall call{x, skip, num_groups, weight, bias, eps, add, scale, shift};
  call.folds = true;
  group_norm_into(call, folded, {});
}

Tensor group_norm_fold_cpu(
    Tensor x, OptionalTensor skip, int64_t num_groups, OptionalTensor weight, OptionalTensor bias, double eps,
    OptionalTensor add, OptionalTensor scale, OptionalTensor shift) {
  check(x.dim() == 4 && x.numel() > 0, "x must be (B, C, H, W) and not empty");
  const int64_t channels = x.size(1) + (skip ? skip->size(1) : 0);
  const Tensor folded = torch::stable::new_empty(x, {x.size(0), cpu::kFoldRows, channels}, ScalarType::Float);
  group_norm_fold_into(x, skip, num_groups, weight, bias, eps, add, scale, shift, folded);
  return folded;
}

const bool in_programs = runs_in_programs<group_norm_silu_into>("group_norm_silu_forward") &&
                         runs_in_programs<group_norm_silu_concat_into>("group_norm_silu_concat_forward") &&
                         runs_in_programs<group_norm_fold_into>("group_norm_fold");

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("group_norm_fold", TORCH_BOX(&group_norm_fold_cpu));
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu_cpu));
  m.impl("group_norm_silu_forward", TORCH_BOX(&group_norm_silu_cpu));
  m.impl("group_norm_silu_concat", TORCH_BOX(&group_norm_silu_concat_cpu));
  m.impl("group_norm_silu_concat_forward", TORCH_BOX(&group_norm_silu_concat_cpu));
}

}  // namespace
}  // namespace ddpm_fast
