// posterior_step and posterior_step_ on CUDA: checks and layouts around posterior_step.cu.
#include <tuple>

#include "op.h"

namespace ddpm_fast {
namespace {

void step_into(
    const Tensor& x, Tensor out, Tensor table, Tensor i, OptionalTensor noise, OptionalTensor seed,
    OptionalTensor image_index, OptionalTensor x0_prev, double clip, OptionalTensor clip_each,
    const Tensor& x_next, const OptionalTensor& x0) {
  const Dtype dtype = kernel_dtype("x", x), out_dtype = kernel_dtype("out", out);
  check_posterior_step(x, out, table, noise, seed, image_index, x0_prev, clip_each);
  const OnDevice device("x", x);
  device.check_same("out", out);
  device.check_same("table", table);
  device.check_same("i", i);
  device.check_same("noise", noise);
  device.check_same("seed", seed);
  device.check_same("image_index", image_index);
  device.check_same("x0_prev", x0_prev);
  device.check_same("clip", clip_each);
  const int64_t batch = x.size(0);
  i = checked_per_sample("i", i, batch);
  if (seed) {
    seed = checked_per_sample("seed", *seed, batch);
    image_index = checked_per_sample("image_index", *image_index, batch);
  }
  out = keep_layout(out);
  table = as_contiguous(table);
  for (OptionalTensor* given : {&noise, &x0_prev, &clip_each}) {
    if (*given) *given = as_contiguous(**given);
  }
  if (x.numel() == 0) return;
  const cuda::PerSample none = {};
  cuda::posterior_step(
      {dtype,
       out_dtype,
       batch,
       x.numel() / batch,
       out.numel() / batch,
       layout_of(out),
       x.const_data_ptr(),
       out.const_data_ptr(),
       data_of(noise),
       data_of(x0_prev),
       x_next.mutable_data_ptr(),
       x0 ? x0->mutable_data_ptr() : nullptr,
       static_cast<const float*>(table.const_data_ptr()),
       table.size(0),
       table.size(1),
       per_sample(i),
       seed ? per_sample(*seed) : none,
       image_index ? per_sample(*image_index) : none,
       static_cast<const float*>(data_of(clip_each)),
       static_cast<float>(clip)},
      device.stream());
}

std::tuple<Tensor, Tensor> posterior_step_cuda(
    Tensor x, Tensor out, Tensor table, Tensor i, OptionalTensor noise, OptionalTensor seed,
    OptionalTensor image_index, OptionalTensor x0_prev, double clip, OptionalTensor clip_each) {
  x = as_contiguous(x);
  const Tensor x_next = empty_as(x), x0 = empty_as(x);
  step_into(x, out, table, i, noise, seed, image_index, x0_prev, clip, clip_each, x_next, x0);
  return {x_next, x0};
}

void posterior_step_in_place_cuda(
    Tensor x, Tensor out, Tensor table, Tensor i, OptionalTensor noise, OptionalTensor seed,
    OptionalTensor image_index, OptionalTensor x0, double clip, OptionalTensor clip_each) {
  check(x.is_contiguous() && (!x0 || x0->is_contiguous()), "x and x0 must be contiguous");
  step_into(x, out, table, i, noise, seed, image_index, x0, clip, clip_each, x, x0);
}

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CUDA, m) {
  m.impl("posterior_step", TORCH_BOX(&posterior_step_cuda));
  m.impl("posterior_step_", TORCH_BOX(&posterior_step_in_place_cuda));
}

}  // namespace
}  // namespace ddpm_fast
