// q_sample and q_sample_counter on CUDA: checks and layouts around q_sample.cu.
#include <tuple>

#include "op.h"

namespace ddpm_fast {
namespace {

Tensor q_sample_cuda(Tensor x0, Tensor noise, Tensor t, Tensor table) {
  const Dtype dtype = kernel_dtype("x0", x0);
  check_like("noise", noise, x0, "x0");
  check_q_sample(x0, table);
  const OnDevice device("x0", x0);
  device.check_same("noise", noise);
  device.check_same("t", t);
  device.check_same("table", table);
  const int64_t batch = x0.size(0);
  t = checked_per_sample("t", t, batch);
  table = as_contiguous(table);
  x0 = keep_layout(x0);
  noise = like_layout(noise, x0);
  Tensor x_t = empty_as(x0);
  if (x0.numel() == 0) return x_t;
  cuda::q_sample(
      {dtype, batch, x0.numel() / batch, x0.const_data_ptr(), noise.const_data_ptr(), x_t.mutable_data_ptr(),
       static_cast<const float*>(table.const_data_ptr()), table.size(0), per_sample(t)},
      device.stream());
  return x_t;
}

std::tuple<Tensor, Tensor> q_sample_counter_cuda(
    Tensor x0, Tensor t, Tensor table, Tensor seed, Tensor image_index) {
  const Dtype dtype = kernel_dtype("x0", x0);
  check_q_sample(x0, table);
  const OnDevice device("x0", x0);
  device.check_same("t", t);
  device.check_same("table", table);
  device.check_same("seed", seed);
  device.check_same("image_index", image_index);
  const int64_t batch = x0.size(0);
  t = checked_per_sample("t", t, batch);
  seed = checked_per_sample("seed", seed, batch);
  image_index = checked_per_sample("image_index", image_index, batch);
  table = as_contiguous(table);
  x0 = keep_layout(x0);
  Tensor x_t = empty_as(x0), noise = empty_as(x0);
  if (x0.numel() == 0) return {x_t, noise};
  cuda::q_sample_counter(
      {dtype, batch, x0.numel() / batch, layout_of(x0), x0.const_data_ptr(), x_t.mutable_data_ptr(),
       noise.mutable_data_ptr(), static_cast<const float*>(table.const_data_ptr()), table.size(0),
       per_sample(t), per_sample(seed), per_sample(image_index)},
      device.stream());
  return {x_t, noise};
}

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CUDA, m) {
  m.impl("q_sample", TORCH_BOX(&q_sample_cuda));
  m.impl("q_sample_counter", TORCH_BOX(&q_sample_counter_cuda));
}

}  // namespace
}  // namespace ddpm_fast
