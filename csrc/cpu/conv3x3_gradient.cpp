// The gradients to conv3x3's weight and bias on the CPU: checks, layouts and threads around
// kernels/conv3x3_gradient.h.
#include <tuple>

#include "../common.h"
#include "../layout.h"
#include "conv3x3.h"
#include "kernels.h"
#include "workspace.h"

namespace ddpm_fast {
namespace {

// Threads share a block's tiles, then its positions: the same sums for any number of them.
std::tuple<Tensor, Tensor> conv3x3_weight_gradient_cpu(Tensor grad, Tensor x, Tensor weight) {
  for (const Tensor& value : {grad, x, weight}) {
    check(
        value.scalar_type() == ScalarType::Float && value.dim() == 4 && value.numel() > 0,
        "grad, x and weight must be float32 of four dimensions, not empty");
  }
  check(
      grad.size(0) == x.size(0) && grad.size(2) == x.size(2) && grad.size(3) == x.size(3) &&
          weight.size(0) == grad.size(1) && weight.size(1) == x.size(1) && weight.size(2) == 3 &&
          weight.size(3) == 3,
      "grad, x and weight must be those of one convolution");
  grad = to_channels_last(grad);
  x = to_channels_last(x);
  const cpu::Conv3x3GradientKernels& kernels = cpu::kernels().conv3x3_gradient;
  const int64_t channels = x.size(1);
  const cpu::Conv3x3Plan plan = kernels.plan({x.size(0), x.size(2), x.size(3), channels, grad.size(1)});

  thread_local Workspace for_inputs, for_gradients, for_sums;
  float* const inputs = for_inputs.floats(plan.transformed);
  float* const gradients = for_gradients.floats(plan.products);
  float* const sums = for_sums.floats(plan.packed);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    torch::stable::parallel_for(0, plan.block, 8, [&](int64_t first, int64_t last) {
      kernels.transform(plan, floats(x), floats(grad), block, first, last, inputs, gradients);
    });
    torch::stable::parallel_for(0, plan.panels * kernels.tasks, 8, [&](int64_t first, int64_t last) {
      kernels.accumulate(plan, inputs, gradients, block, first, last, sums);
    });
  }
  const bool channels_last = is_channels_last(weight);
  const Tensor to_weight = empty_with_sizes(weight, weight.sizes().data(), channels_last);
  const Tensor to_bias = torch::stable::new_empty(weight, {weight.size(0)});
  const auto written = in_layout(static_cast<float*>(to_weight.mutable_data_ptr()), channels, channels_last);
  torch::stable::parallel_for(0, plan.panels, 1, [&](int64_t first, int64_t last) {
    kernels.finish(plan, sums, first, last, written, static_cast<float*>(to_bias.mutable_data_ptr()));
  });
  return {to_weight, to_bias};
}

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("conv3x3_weight_gradient", TORCH_BOX(&conv3x3_weight_gradient_cpu));
}

}  // namespace
}  // namespace ddpm_fast
