// conv3x3 and linear on the CPU: checks, layouts, threads and the workspace around kernels/conv3x3.h.
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

using cpu::Conv3x3Input;
using cpu::Conv3x3Kernels;
using cpu::Conv3x3Plan;
using cpu::Conv3x3Shape;
using Weight = cpu::Conv3x3Weight<const float>;

const Conv3x3Kernels& kernels_of(int64_t down, int64_t across, int64_t taps = 3) {
  for (const Conv3x3Kernels& kernels : cpu::kernels().conv3x3) {
    if (kernels.taps == taps && kernels.down == down && kernels.across == across) return kernels;
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

Workspace& for_scratch() {
  thread_local Workspace workspace;
  return workspace;
}

// With blocks for every thread a thread takes whole ones, and nothing waits. With fewer, all tiles are
// transformed, and then each thread takes panels of output channels: it reads their weights alone.
void run(
    const Conv3x3Kernels& kernels, const Conv3x3Plan& plan, const Conv3x3Input& x, const float* packed,
    const float* bias, const float* plus, float* y) {
  const int64_t blocks = plan.blocks, scratch_size = plan.scratch + (x.is_plain() ? 0 : plan.pixels);
  if (blocks >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      float* const transformed = for_tiles().floats(plan.transformed);
      float* const products = for_products().floats(plan.products);
      float* const scratch = for_scratch().floats(scratch_size);
      kernels.begin(plan, x, scratch);
      for (int64_t block = first; block < last; ++block) {
        kernels.transform(plan, x, block, 0, plan.block, transformed, scratch);
        kernels.run(plan, transformed, packed, bias, plus, y, block, 0, plan.panels, products);
      }
    });
    return;
  }
  float* const transformed = for_tiles().floats(blocks * plan.transformed);
  torch::stable::parallel_for(0, blocks * plan.block, 1, [&](int64_t first, int64_t last) {
    float* const scratch = for_scratch().floats(scratch_size);
    kernels.begin(plan, x, scratch);
    for (int64_t block = first / plan.block; block * plan.block < last; ++block) {
      const int64_t begin = block * plan.block;
      kernels.transform(
          plan, x, block, std::max<int64_t>(first - begin, 0), std::min(last - begin, plan.block),
          transformed + block * plan.transformed, scratch);
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

int64_t packed_size(const Conv3x3Kernels& kernels, int64_t in_channels, int64_t out_channels) {
  check(in_channels > 0 && out_channels > 0, "channels must be positive");
  return kernels.plan({1, 1, 1, in_channels, out_channels}, 1).packed;
}

void pack(
    const Conv3x3Kernels& kernels, const Weight& weight, int64_t in_channels, int64_t out_channels,
    const Tensor& packed) {
  const Conv3x3Plan plan = kernels.plan({1, 1, 1, in_channels, out_channels}, 1);
  check(
      packed.scalar_type() == ScalarType::Float && packed.is_contiguous() && packed.numel() == plan.packed,
      "packed must be float32 with ", plan.packed, " elements");
  float* const to = static_cast<float*>(packed.mutable_data_ptr());
  in_huge_pages(to, plan.packed);
  torch::stable::parallel_for(0, plan.panels, 1, [&](int64_t first, int64_t last) {
    float* const scratch = for_scratch().floats(32 * plan.scratch);
    kernels.pack(plan, weight, first, last, to, scratch);
  });
}

// `turned` by 180 degrees, input and output channels in each other's place.
void pack(Tensor weight, bool turned, int64_t down, int64_t across, const Tensor& packed) {
  check(
      weight.scalar_type() == ScalarType::Float && weight.dim() == 4 && weight.size(2) == 3 &&
          weight.size(3) == 3 && weight.numel() > 0,
      "weight must be float32 (C_out, C_in, 3, 3)");
  weight = keep_layout(weight);
  int64_t in_channels = weight.size(1), out_channels = weight.size(0);
  Weight taps = in_layout(floats(weight), in_channels, is_channels_last(weight));
  if (turned) {
    std::swap(in_channels, out_channels);
    taps = {taps.at(0, 0, 8), taps.step_c, taps.step_k, -taps.step_tap};
  }
  pack(kernels_of(down, across), taps, in_channels, out_channels, packed);
}

// The channels of x and skip together.
int64_t channels_of(const Tensor& x, const OptionalTensor& skip) {
  const int64_t last = x.dim() == 4 ? 1 : x.dim() - 1;
  if (!skip) return x.size(last);
  bool like = skip->scalar_type() == x.scalar_type() && skip->dim() == x.dim() && skip->numel() > 0;
  for (int64_t d = 0; like && d < x.dim(); ++d) like = d == last || skip->size(d) == x.size(d);
  check(like, "skip must be like x but for its channels");
  return x.size(last) + skip->size(last);
}

// Of an x, skip and plus that are channels last, into such a y.
void convolve(
    const Conv3x3Kernels& kernels, const Conv3x3Shape& shape, const Tensor& x, const OptionalTensor& skip,
    OptionalTensor norm, bool silu, const Tensor& packed, OptionalTensor bias, const OptionalTensor& plus,
    const Tensor& y) {
  const Conv3x3Plan plan = kernels.plan(shape, torch::stable::get_num_threads());
  check(
      packed.scalar_type() == ScalarType::Float && packed.is_contiguous() && packed.numel() == plan.packed,
      "packed must be what was made of a weight for such an x");
  if (bias) {
    check(
        bias->scalar_type() == ScalarType::Float && bias->numel() == shape.out_channels,
        "bias must be float32 (C_out,)");
    bias = as_contiguous(*bias);
  }
  if (norm) {
    check(
        norm->scalar_type() == ScalarType::Float && norm->dim() == 3 && norm->size(0) == shape.batch &&
            norm->size(1) == cpu::kFoldRows && norm->size(2) == shape.in_channels,
        "norm must be float32 (B, 4, C)");
    norm = as_contiguous(*norm);
  }
  const int64_t split = shape.in_channels - (skip ? skip->numel() / (y.numel() / shape.out_channels) : 0);
  const Conv3x3Input input = {
      floats(x), skip ? floats(*skip) : nullptr, split, norm ? floats(*norm) : nullptr, silu};
  run(kernels, plan, input, floats(packed), bias ? floats(*bias) : nullptr, plus ? floats(*plus) : nullptr,
      static_cast<float*>(y.mutable_data_ptr()));
}

int64_t conv3x3_packed_size_cpu(int64_t in_channels, int64_t out_channels, int64_t down, int64_t across) {
  return packed_size(kernels_of(down, across), in_channels, out_channels);
}

void conv3x3_pack_cpu(Tensor weight, int64_t down, int64_t across, Tensor packed) {
  pack(weight, /*turned=*/false, down, across, packed);
}

Tensor conv3x3_packed_cpu(
    Tensor x, Tensor packed, OptionalTensor bias, OptionalTensor plus, int64_t out_channels, int64_t down,
    int64_t across, OptionalTensor skip, OptionalTensor norm) {
  check(
      x.scalar_type() == ScalarType::Float && x.dim() == 4 && x.numel() > 0,
      "x must be float32 (B, C, H, W) and not empty");
  check(out_channels > 0, "out_channels must be positive");
  const bool channels_last = is_channels_last(x);
  const int64_t channels = channels_of(x, skip);
  x = to_channels_last(x);
  if (skip) skip = to_channels_last(*skip);
  Tensor y = torch::stable::empty(
      {x.size(0), out_channels, x.size(2), x.size(3)}, x.scalar_type(), std::nullopt, x.device(),
      std::nullopt, MemoryFormat::ChannelsLast);
  if (plus) {
    check_like("plus", *plus, y, "the result");
    plus = to_channels_last(*plus);
  }
  const Conv3x3Shape shape = {x.size(0), x.size(2), x.size(3), channels, out_channels};
  convolve(kernels_of(down, across), shape, x, skip, norm, /*silu=*/true, packed, bias, plus, y);
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
  return conv3x3_packed_cpu(x, packed, bias, plus, weight.size(0), down, across, {}, {});
}

// To its input a convolution's gradient is the convolution with the weight turned.
Tensor conv3x3_input_gradient_cpu(Tensor grad, Tensor weight, int64_t down, int64_t across) {
  check(
      grad.dim() == 4 && weight.dim() == 4 && weight.size(0) == grad.size(1),
      "weight must have grad's channels");
  const Tensor packed = packed_now(weight, /*turned=*/true, down, across);
  return conv3x3_packed_cpu(grad, packed, {}, {}, weight.size(1), down, across, {}, {});
}

int64_t linear_packed_size_cpu(int64_t in_features, int64_t out_features) {
  return packed_size(kernels_of(1, 1, 1), in_features, out_features);
}

void linear_pack_cpu(Tensor weight, Tensor packed) {
  check(
      weight.scalar_type() == ScalarType::Float && weight.dim() == 2 && weight.numel() > 0,
      "weight must be float32 (C_out, C_in)");
  weight = as_contiguous(weight);
  const int64_t in_features = weight.size(1);
  pack(kernels_of(1, 1, 1), {floats(weight), in_features, 1, 0}, in_features, weight.size(0), packed);
}

Tensor linear_packed_cpu(
    Tensor x, Tensor packed, OptionalTensor bias, OptionalTensor plus, int64_t out_features,
    OptionalTensor skip, OptionalTensor norm) {
  check(
      x.scalar_type() == ScalarType::Float && x.dim() == 2 && x.numel() > 0,
      "x must be float32 (N, C) and not empty");
  check(out_features > 0, "out_features must be positive");
  const int64_t rows = x.size(0), images = norm ? norm->size(0) : 1;
  check(images > 0 && rows % images == 0, "norm must be of images of as many rows each");
  const int64_t features = channels_of(x, skip);
  x = as_contiguous(x);
  if (skip) skip = as_contiguous(*skip);
  Tensor y = torch::stable::new_empty(x, {rows, out_features});
  if (plus) {
    check_like("plus", *plus, y, "the result");
    plus = as_contiguous(*plus);
  }
  const Conv3x3Shape shape = {images, 1, rows / images, features, out_features};
  convolve(kernels_of(1, 1, 1), shape, x, skip, norm, /*silu=*/false, packed, bias, plus, y);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CompositeExplicitAutograd, m) {
  m.impl("conv3x3_packed_size", TORCH_BOX(&conv3x3_packed_size_cpu));
  m.impl("linear_packed_size", TORCH_BOX(&linear_packed_size_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(ddpm_fast, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3_cpu));
  m.impl("conv3x3_forward", TORCH_BOX(&conv3x3_cpu));
  m.impl("conv3x3_input_gradient", TORCH_BOX(&conv3x3_input_gradient_cpu));
  m.impl("conv3x3_pack", TORCH_BOX(&conv3x3_pack_cpu));
  m.impl("conv3x3_packed", TORCH_BOX(&conv3x3_packed_cpu));
  m.impl("linear_pack", TORCH_BOX(&linear_pack_cpu));
  m.impl("linear_packed", TORCH_BOX(&linear_packed_cpu));
}

}  // namespace
}  // namespace ddpm_fast
