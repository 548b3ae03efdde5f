// group_norm_silu, its backward and group_norm_silu_concat on CUDA: checks, layouts and dtypes around
// group_norm_silu.cu and group_norm_silu_backward.cu.
#include <array>
#include <tuple>
#include <vector>

#include "op.h"

namespace ddpm_fast {
namespace {

// What every one of the ops is given, checked, and as the kernels take it.
class Norm {
 public:
  Norm(
      const Tensor& x, const OptionalTensor& skip, int64_t num_groups, const OptionalTensor& weight,
      const OptionalTensor& bias, double eps, const OptionalTensor& add, const OptionalTensor& scale,
      const OptionalTensor& shift, bool silu)
      : device_("x", x), x_(keep_layout(x)), skip_(skip) {
    op_.dtype = kernel_dtype("x", x);
    check(x.dim() >= 2 && x.numel() > 0, "x must be (B, C, ...) and not empty");
    op_.channels_last = is_channels_last(x);
    op_.batch = x.size(0);
    op_.x_channels = op_.channels = x.size(1);
    op_.pixels = x.numel() / (x.size(0) * x.size(1));
    if (skip) {
      check(
          skip->scalar_type() == x.scalar_type() && skip->dim() == x.dim() && skip->size(0) == op_.batch &&
              skip->size(1) > 0 && skip->numel() == op_.batch * skip->size(1) * op_.pixels,
          "skip must be like x but for its channels");
      device_.check_same("skip", skip);
      skip_ = like_layout(*skip, x_);
      op_.channels += skip->size(1);
    }
    check(num_groups > 0 && op_.channels % num_groups == 0, "num_groups must divide the channels");
    op_.groups = num_groups;
    op_.eps = static_cast<float>(eps);
    op_.silu = silu;
    op_.x = x_.const_data_ptr();
    op_.skip = data_of(skip_);
    op_.weight = operand("weight", weight, 1);
    op_.bias = operand("bias", bias, 1);
    op_.add = operand("add", add, op_.batch);
    op_.scale = operand("scale", scale, op_.batch);
    op_.shift = operand("shift", shift, op_.batch);
  }

  const cuda::GroupNorm& op() const { return op_; }
  const OnDevice& device() const { return device_; }
  const Tensor& x() const { return x_; }

  // Uninitialised, in x's layout, with all the channels.
  Tensor empty() const { return skip_ ? empty_with_channels(x_, op_.channels) : empty_as(x_); }

  Tensor floats(std::vector<int64_t> sizes) const {
    return torch::stable::new_empty(x_, sizes, ScalarType::Float);
  }

 private:
  // (C,), or (B, C) with rows anywhere
  cuda::Operand operand(const char* name, const OptionalTensor& given, int64_t rows) {
    if (!given) return {};
    device_.check_same(name, given);
    check(given->numel() == rows * op_.channels, name, " must have ", rows * op_.channels, " elements");
    const int64_t last = given->dim() - 1;
    const bool as_it_lies = given->dim() == (rows == 1 ? 1 : 2) && given->size(last) == op_.channels &&
                            (given->stride(last) == 1 || op_.channels == 1);
    const Tensor& values = kept_.emplace_back(as_it_lies ? *given : as_contiguous(*given));
    const int64_t stride = rows == 1 ? 0 : as_it_lies ? values.stride(0) : op_.channels;
    return {values.const_data_ptr(), dtype_of(name, values), stride};
  }

  OnDevice device_;
  Tensor x_;
  OptionalTensor skip_;
  std::vector<Tensor> kept_;
  cuda::GroupNorm op_ = {};
};

std::tuple<Tensor, OptionalTensor> forward(const Norm& norm, bool concat) {
  Tensor y = norm.empty();
  OptionalTensor both;
  if (concat) both = norm.empty();
  const Tensor scratch = norm.floats({cuda::group_norm_scratch(norm.op())});
  cuda::group_norm_silu(
      norm.op(), y.mutable_data_ptr(), both ? both->mutable_data_ptr() : nullptr,
      static_cast<float*>(scratch.mutable_data_ptr()), norm.device().stream());
  return {y, both};
}

Tensor group_norm_silu_cuda(
    Tensor x, int64_t num_groups, OptionalTensor weight, OptionalTensor bias, double eps, OptionalTensor add,
    OptionalTensor scale, OptionalTensor shift, bool silu) {
  const Norm norm(x, std::nullopt, num_groups, weight, bias, eps, add, scale, shift, silu);
  return std::get<0>(forward(norm, false));
}

std::tuple<Tensor, Tensor> group_norm_silu_concat_cuda(
    Tensor x, Tensor skip, int64_t num_groups, OptionalTensor weight, OptionalTensor bias, double eps,
    OptionalTensor add, OptionalTensor scale, OptionalTensor shift, bool silu, bool concat) {
  const Norm norm(x, skip, num_groups, weight, bias, eps, add, scale, shift, silu);
  const auto [y, both] = forward(norm, concat);
  return {y, both ? *both : torch::stable::new_empty(x, {0})};
}

// The kernel gives the parameters' gradients by sample, in float32.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward_cuda(
    Tensor grad, Tensor x, int64_t num_groups, OptionalTensor weight, OptionalTensor bias, double eps,
    OptionalTensor add, OptionalTensor scale, OptionalTensor shift, bool silu) {
  const Norm norm(x, std::nullopt, num_groups, weight, bias, eps, add, scale, shift, silu);
  check_like("grad", grad, x, "x");
  norm.device().check_same("grad", grad);
  grad = like_layout(grad, norm.x());
  Tensor grad_x = norm.empty();
  const std::array<OptionalTensor, 5> given = {weight, bias, add, scale, shift};
  std::vector<Tensor> grads;
  std::array<float*, 5> to = {};
  for (size_t k = 0; k < given.size(); ++k) {
    grads.push_back(
        given[k] ? norm.floats({norm.op().batch, norm.op().channels}) : torch::stable::new_empty(x, {0}));
    if (given[k]) to[k] = static_cast<float*>(grads[k].mutable_data_ptr());
  }
  const Tensor scratch = norm.floats({cuda::group_norm_backward_scratch(norm.op())});
  cuda::group_norm_silu_backward(
      norm.op(), grad.const_data_ptr(),
      {grad_x.mutable_data_ptr(), nullptr, to[0], to[1], to[2], to[3], to[4]},
      static_cast<float*>(scratch.mutable_data_ptr()), norm.device().stream());

  const std::array<int64_t, 1> samples = {0};
  for (size_t k = 0; k < given.size(); ++k) {
    if (!given[k]) continue;
    if (k < 2) grads[k] = torch::stable::sum(grads[k], samples);
    if (given[k]->scalar_type() != ScalarType::Float) {
      grads[k] = torch::stable::to(grads[k], given[k]->scalar_type());
    }
  }
  return {grad_x, grads[0], grads[1], grads[2], grads[3], grads[4]};
}

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CUDA, m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu_cuda));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward_cuda));
  m.impl("group_norm_silu_concat", TORCH_BOX(&group_norm_silu_concat_cuda));
}

}  // namespace
}  // namespace ddpm_fast
