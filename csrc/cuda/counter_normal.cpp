// counter_normal and philox4x32_10 on CUDA: checks around counter_normal.cu.
#include <vector>

#include "op.h"

namespace ddpm_fast {
namespace {

Tensor counter_normal_cuda(
    std::vector<int64_t> shape, Tensor seed, Tensor image_index, Tensor step, int64_t stream) {
  check(!shape.empty(), "shape must have a batch dimension");
  const int64_t batch = shape[0];
  const OnDevice device("image_index", image_index);
  device.check_same("seed", seed);
  device.check_same("step", step);
  seed = checked_per_sample("seed", seed, batch);
  image_index = checked_per_sample("image_index", image_index, batch);
  step = checked_per_sample("step", step, batch);
  Tensor out = torch::stable::new_empty(image_index, shape, ScalarType::Float);
  if (out.numel() == 0) return out;
  cuda::counter_normal(
      {batch, out.numel() / batch, static_cast<float*>(out.mutable_data_ptr()), per_sample(seed),
       per_sample(image_index), per_sample(step), stream},
      device.stream());
  return out;
}

Tensor philox4x32_10_cuda(Tensor counter, Tensor key) {
  check_philox4x32_10(counter, key);
  const OnDevice device("counter", counter);
  device.check_same("key", key);
  counter = as_contiguous(counter);
  key = as_contiguous(key);
  Tensor out = empty_as(counter);
  cuda::philox4x32_10(
      {static_cast<const int64_t*>(counter.const_data_ptr()),
       static_cast<const int64_t*>(key.const_data_ptr()), static_cast<int64_t*>(out.mutable_data_ptr()),
       counter.size(0)},
      device.stream());
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CUDA, m) {
  m.impl("counter_normal", TORCH_BOX(&counter_normal_cuda));
  m.impl("philox4x32_10", TORCH_BOX(&philox4x32_10_cuda));
}

}  // namespace
}  // namespace ddpm_fast
