// conv3x3 on the CPU: checks, layouts, threads and the workspace around kernels/conv3x3.h.
#include <algorithm>
#include <utility>

#include "../checks.h"
#include "../common.h"
#include "../layout.h"
#include "conv3x3.h"
#include "kernels.h"
#include "workspace.h"

namespace ddpm_fast {
namespace {

using cpu::Conv3x3Kernels;
using cpu::Conv3x3Plan;

const Conv3x3Kernels& kernels_of(int64_t down, int64_t across) {
  for (const Conv3x3Kernels& kernels : cpu::kernels().conv3x3) {
    if (kernels.down == down && kernels.across == across) return kernels;
  }
  fail<std::invalid_argument>("there are no tiles of ", down, " x ", across, " outputs");
}

Workspace& for_tiles() {
  thread_local Workspace workspace;
  return workspace;
}

Workspace& for_products() {
  thread_local Workspace workspace;
  return workspace;
}

// With blocks for every thread a thread takes whole ones, and nothing waits. With fewer, all tiles are
// transformed, and then each thread takes panels of output channels: it reads their weights alone.
void run(
    const Conv3x3Kernels& kernels, const Conv3x3Plan& plan, const float* x, const float* packed,
    const float* bias, const float* plus, float* y) {
  const int64_t blocks = plan.blocks;
  if (blocks >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      float* const transformed = for_tiles().floats(plan.transformed);
      float* const products = for_products().floats(plan.products);
      for (int64_t block = first; block < last; ++block) {
        kernels.transform(plan, x, block, 0, plan.block, transformed);
        kernels.run(plan, transformed, packed, bias, plus, y, block, 0, plan.panels, products);
      }
    });
    return;
  }
  float* const transformed = for_tiles().floats(blocks * plan.transformed);
  torch::stable::parallel_for(0, blocks * plan.block, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first / plan.block; block * plan.block < last; ++block) {
      const int64_t begin = block * plan.block;
      kernels.transform(
          plan, x, block, std::max<int64_t>(first - begin, 0), std::min(last - begin, plan.block),
          transformed + block * plan.transformed);
    }
  });
  torch::stable::parallel_for(0, plan.panels * blocks, 1, [&](int64_t first, int64_t last) {
    float* const products = for_products().floats(plan.products);
    for (int64_t task = first; task < last; ++task) {
      const int64_t panel = task / blocks, block = task % blocks;
      kernels.run(
          plan, transformed + block * plan.transformed, packed, bias, plus, y, block, panel, panel + 1,
          products);
    }
  });
}

// `turned` by 180 degrees, input and output channels in each other's place.
void pack(Tensor weight, bool turned, int64_t down, int64_t across, const Tensor& packed) {
  check(
      weight.scalar_type() == ScalarType::Float && weight.dim() == 4 && weight.size(2) == 3 &&
          weight.size(3) == 3 && weight.numel() > 0,
      "weight must be float32 (C_out, C_in, 3, 3)");
  weight = keep_layout(weight);
  const Conv3x3Kernels& kernels = kernels_of(down, across);
  int64_t in_channels = weight.size(1), out_channels = weight.size(0);
  auto taps = in_layout(floats(weight), in_channels, is_channels_last(weight));
  if (turned) {
    std::swap(in_channels, out_channels);
    taps = {taps.at(0, 0, 8), taps.step_c, taps.step_k, -taps.step_tap};
  }
  const Conv3x3Plan plan = kernels.plan({1, 1, 1, in_channels, out_channels}, 1);
  check(
      packed.scalar_type() == ScalarType::Float && packed.is_contiguous() && packed.numel() == plan.packed,
      "packed must be float32 with ", plan.packed, " elements");
  float* const to = static_cast<float*>(packed.mutable_data_ptr());
  in_huge_pages(to, plan.packed);
  torch::stable::parallel_for(
      0, plan.panels, 1, [&](int64_t first, int64_t last) { kernels.pack(plan, taps, first, last, to); });
}

void conv3x3_pack_cpu(Tensor weight, int64_t down, int64_t across, Tensor packed) {
  pack(weight, /*turned=*/false, down, across, packed);
}

Tensor conv3x3_packed_cpu(
    Tensor x, Tensor packed, OptionalTensor bias, OptionalTensor plus, int64_t out_channels, int64_t down,
    int64_t across) {
  check(
      x.scalar_type() == ScalarType::Float && x.dim() == 4 && x.numel() > 0,
      "x must be float32 (B, C, H, W) and not empty");
  check(out_channels > 0, "out_channels must be positive");
  const bool channels_last = is_channels_last(x);
  x = to_channels_last(x);
  const Conv3x3Kernels& kernels = kernels_of(down, across);
  const Conv3x3Plan plan = kernels.plan(
      {x.size(0), x.size(2), x.size(3), x.size(1), out_channels}, torch::stable::get_num_threads());
  check(
      packed.scalar_type() == ScalarType::Float && packed.is_contiguous() && packed.numel() == plan.packed,
      "packed must be what conv3x3_pack made of a weight for such an x");
  if (bias) {
    check(
        bias->scalar_type() == ScalarType::Float && bias->numel() == out_channels,
        "bias must be float32 (C_out,)");
    bias = as_contiguous(*bias);
  }
  Tensor y = torch::stable::empty(
      {x.size(0), out_channels, x.size(2), x.size(3)}, x.scalar_type(), std::nullopt, x.device(),
      std::nullopt, MemoryFormat::ChannelsLast);
  if (plus) {
    check_like("plus", *plus, y, "the result");
    plus = to_channels_last(*plus);
  }
  run(kernels, plan, floats(x), floats(packed), bias ? floats(*bias) : nullptr,
      plus ? floats(*plus) : nullptr, static_cast<float*>(y.mutable_data_ptr()));
  return channels_last ? y : torch::stable::contiguous(y);
}

Tensor packed_now(const Tensor& weight, bool turned, int64_t down, int64_t across) {
  check(weight.dim() == 4, "weight must be (C_out, C_in, 3, 3)");
  const Conv3x3Plan plan =
      kernels_of(down, across).plan({1, 1, 1, weight.size(turned ? 0 : 1), weight.size(turned ? 1 : 0)}, 1);
  const Tensor packed = torch::stable::new_empty(weight, {plan.packed});
  pack(weight, turned, down, across, packed);
  return packed;
}

Tensor conv3x3_cpu(
    Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor plus, int64_t down, int64_t across) {
  check(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1), "weight must have x's channels");
  const Tensor packed = packed_now(weight, /*turned=*/false, down, across);
  return conv3x3_packed_cpu(x, packed, bias, plus, weight.size(0), down, across);
}

// To its input a convolution's gradient is the convolution with the weight turned.
Tensor conv3x3_input_gradient_cpu(Tensor grad, Tensor weight, int64_t down, int64_t across) {
  check(
      grad.dim() == 4 && weight.dim() == 4 && weight.size(0) == grad.size(1),
      "weight must have grad's channels");
  const Tensor packed = packed_now(weight, /*turned=*/true, down, across);
  return conv3x3_packed_cpu(grad, packed, std::nullopt, std::nullopt, weight.size(1), down, across);
}

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3_cpu));
  m.impl("conv3x3_forward", TORCH_BOX(&conv3x3_cpu));
  m.impl("conv3x3_input_gradient", TORCH_BOX(&conv3x3_input_gradient_cpu));
  m.impl("conv3x3_pack", TORCH_BOX(&conv3x3_pack_cpu));
  m.impl("conv3x3_packed", TORCH_BOX(&conv3x3_packed_cpu));
}

}  // namespace
}  // namespace ddpm_fast
