// conv3x3 and linear on the CPU: checks, layouts, threads and the workspace around kernels/conv3x3.h.
#include <algorithm>
#include <utility>

#include "../checks.h"
#include "../common.h"
#include "../layout.h"
#include "conv3x3.h"
#include "group_norm.h"
#include "kernels.h"
#include "program.h"
#include "team.h"
#include "workspace.h"

namespace ddpm_fast {
namespace {

using cpu::Conv3x3Input;
using cpu::Conv3x3Kernels;
using cpu::Conv3x3Plan;
using cpu::Conv3x3Shape;
using Weight = cpu::Conv3x3Weight<const float>;

const Conv3x3Kernels& kernels_of(
    ScalarType dtype, int64_t down, int64_t across, int64_t resize = 0, int64_t taps = 3) {
  const bool is_float = dtype == ScalarType::Float;
  check(is_float || dtype == ScalarType::BFloat16, "only float32 and bfloat16 have kernels");
  for (const Conv3x3Kernels& kernels : is_float ? cpu::kernels().conv3x3 : cpu::kernels().conv3x3_bfloat16) {
    const bool tiles = kernels.taps == taps && kernels.down == down && kernels.across == across;
    if (tiles && static_cast<int64_t>(kernels.resize) == resize) return kernels;
  }
  fail<std::invalid_argument>(
      "there are no tiles of ", down, " x ", across, " outputs with resize = ", resize);
}

// Of a linear layer.
const Conv3x3Kernels& for_rows(ScalarType dtype) { return kernels_of(dtype, 1, 1, 0, /*taps=*/1); }

Workspace& for_products() {
  thread_local Workspace workspace;
  return workspace;
}

// With blocks for every thread a thread takes whole ones, and nothing waits. With fewer, all tiles are
// transformed, and then each thread takes panels of output channels: it reads their weights alone.
void run(
    const Conv3x3Kernels& kernels, const Conv3x3Plan& plan, const Conv3x3Input& x, const float* packed,
    const float* bias, const void* plus, void* y) {
  const int64_t blocks = plan.blocks, scratch_size = plan.scratch + (x.is_plain() ? 0 : plan.pixels);
  if (blocks >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      float* const transformed = for_operands().floats(plan.transformed);
      float* const products = for_products().floats(plan.products);
      float* const scratch = for_scratch().floats(scratch_size);
      if (!x.is_plain()) kernels.begin(plan, x, scratch);
      for (int64_t block = first; block < last; ++block) {
        kernels.transform(plan, x, block, 0, plan.block, transformed, scratch);
        kernels.run(plan, transformed, packed, bias, plus, y, block, 0, plan.panels, products);
      }
    });
    return;
  }
  float* const transformed = for_operands().floats(blocks * plan.transformed);
  parallel_for(0, blocks * plan.block, 1, [&](int64_t first, int64_t last) {
    float* const scratch = for_scratch().floats(scratch_size);
    if (!x.is_plain()) kernels.begin(plan, x, scratch);
    for (int64_t block = first / plan.block; block * plan.block < last; ++block) {
      const int64_t begin = block * plan.block;
      kernels.transform(
          plan, x, block, std::max<int64_t>(first - begin, 0), std::min(last - begin, plan.block),
          transformed + block * plan.transformed, scratch);
    }
  });
  parallel_for(0, plan.panels * blocks, 1, [&](int64_t first, int64_t last) {
    float* const products = for_products().floats(plan.products);
    for (int64_t block = 0; block < blocks; ++block) {  // tasks are by panel, and then by block
      kernels.run(
          plan, transformed + block * plan.transformed, packed, bias, plus, y, block,
          (first - block + blocks - 1) / blocks, (last - block + blocks - 1) / blocks, products);
    }
  });
}

int64_t packed_size(const Conv3x3Kernels& kernels, int64_t in_channels, int64_t out_channels) {
  check(in_channels > 0 && out_channels > 0, "channels must be positive");
  return kernels.plan({1, 1, 1, in_channels, out_channels}, 1).packed;
}

// Packed weights are in the dtype of what they are for, whatever lies in them.
int64_t packed_elements(const Conv3x3Plan& plan, ScalarType dtype) {
  return plan.packed * (dtype == ScalarType::Float ? 1 : sizeof(float) / sizeof(uint16_t));
}

bool holds(const Tensor& packed, ScalarType dtype, const Conv3x3Plan& plan) {
  return packed.scalar_type() == dtype && packed.is_contiguous() &&
         packed.numel() == packed_elements(plan, dtype);
}

// As float32, in its layout.
Tensor as_floats(const Tensor& weight) {
  if (weight.scalar_type() == ScalarType::Float) return weight;
  const bool channels_last = is_channels_last(weight);
  Tensor made = torch::stable::empty(
      weight.sizes(), ScalarType::Float, std::nullopt, weight.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  cpu::kernels().load(
      dtype_of("weight", weight), weight.const_data_ptr(), static_cast<float*>(made.mutable_data_ptr()),
      weight.numel());
  return made;
}

void pack(
    const Conv3x3Kernels& kernels, ScalarType dtype, const Weight& weight, int64_t in_channels,
    int64_t out_channels, const Tensor& packed) {
  const Conv3x3Plan plan = kernels.plan({1, 1, 1, in_channels, out_channels}, 1);
  check(holds(packed, dtype, plan), "packed must be in the weight's dtype, with ", plan.packed, " floats");
  float* const to = static_cast<float*>(packed.mutable_data_ptr());
  in_huge_pages(to, plan.packed);
  parallel_for(0, plan.panels, 1, [&](int64_t first, int64_t last) {
    float* const scratch = for_scratch().floats(32 * plan.scratch);
    kernels.pack(plan, weight, first, last, to, scratch);
  });
}

// `turned` by 180 degrees, input and output channels in each other's place.
void pack(const Conv3x3Kernels& kernels, Tensor weight, bool turned, const Tensor& packed) {
  check(
      weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.numel() > 0,
      "weight must be (C_out, C_in, 3, 3)");
  const ScalarType dtype = weight.scalar_type();
  weight = as_floats(keep_layout(weight));
  int64_t in_channels = weight.size(1), out_channels = weight.size(0);
  Weight taps = in_layout(floats(weight), in_channels, is_channels_last(weight));
  if (turned) {
    std::swap(in_channels, out_channels);
    taps = {taps.at(0, 0, 8), taps.step_c, taps.step_k, -taps.step_tap};
  }
  pack(kernels, dtype, taps, in_channels, out_channels, packed);
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

// What the arithmetic reads and adds beside x and its weight.
struct Operands {
  OptionalTensor bias, plus, skip, norm;
};

// Of an x, skip and plus that are channels last, into such a y.
void convolve(
    const Conv3x3Kernels& kernels, const Conv3x3Shape& shape, const Tensor& x, const Tensor& packed,
    const Operands& given, bool silu, const Tensor& y) {
  const Conv3x3Plan plan = kernels.plan(shape, torch::stable::get_num_threads());
  check(holds(packed, x.scalar_type(), plan), "packed must be what was made of a weight for such an x");
  const Channels biases("bias", given.bias, shape.out_channels);
  OptionalTensor norm = given.norm;
  if (norm) {
    check(
        norm->scalar_type() == ScalarType::Float && norm->dim() == 3 && norm->size(0) == shape.batch &&
            norm->size(1) == cpu::kFoldRows && norm->size(2) == shape.in_channels,
        "norm must be float32 (B, 4, C)");
    norm = as_contiguous(*norm);
  }
  const auto data = [](const OptionalTensor& of) { return of ? of->const_data_ptr() : nullptr; };
  const int64_t pixels = shape.batch * shape.height * shape.width;
  const int64_t split = shape.in_channels - (given.skip ? given.skip->numel() / pixels : 0);
  const Conv3x3Input input = {
      x.const_data_ptr(), data(given.skip), split, static_cast<const float*>(data(norm)), silu};
  run(kernels, plan, input, static_cast<const float*>(packed.const_data_ptr()), biases.at(0),
      data(given.plus), y.mutable_data_ptr());
}

int64_t conv3x3_packed_size_cpu(
    int64_t in_channels, int64_t out_channels, int64_t down, int64_t across, ScalarType dtype,
    int64_t resize) {
  return packed_size(kernels_of(dtype, down, across, resize), in_channels, out_channels);
}

void conv3x3_pack_cpu(Tensor weight, int64_t down, int64_t across, Tensor packed, int64_t resize) {
  pack(kernels_of(weight.scalar_type(), down, across, resize), weight, /*turned=*/false, packed);
}

// What is convolved, how, and how large the result is.
struct Convolved {
  const Conv3x3Kernels& kernels;
  Conv3x3Shape shape;
  int64_t height, width;

  Convolved(
      const Tensor& x, const OptionalTensor& skip, int64_t out_channels, int64_t down, int64_t across,
      int64_t resize, int64_t shift)
      : kernels(kernels_of(x.scalar_type(), down, across, resize)) {
    check(x.dim() == 4 && x.numel() > 0, "x must be (B, C, H, W) and not empty");
    check(out_channels > 0, "out_channels must be positive");
    shape = {x.size(0), x.size(2), x.size(3), channels_of(x, skip), out_channels, shift};
    height = shape.resized(kernels.resize, x.size(2));
    width = shape.resized(kernels.resize, x.size(3));
    check(
        shift == 0 || (shift == 1 && kernels.resize == cpu::Resize::kDown && height > 0 && width > 0),
        "shift must be 0, or with stride 2 and two rows and columns 1");
  }

  Tensor empty(const Tensor& x, MemoryFormat layout) const {
    return torch::stable::empty(
        {shape.batch, shape.out_channels, height, width}, x.scalar_type(), std::nullopt, x.device(),
        std::nullopt, layout);
  }
};

void convolve_into(
    const Convolved& convolved, const Tensor& x, const Tensor& packed, Operands given, Tensor y) {
  if (given.skip) given.skip = to_channels_last(*given.skip);
  if (given.plus) {
    check_like("plus", *given.plus, y, "the result");
    given.plus = to_channels_last(*given.plus);
  }
  const bool in_place = lies_channels_last(y);
  const Tensor result = in_place ? y : convolved.empty(x, MemoryFormat::ChannelsLast);
  convolve(convolved.kernels, convolved.shape, to_channels_last(x), packed, given, /*silu=*/true, result);
  if (!in_place) torch::stable::copy_(y, result);
}

void conv3x3_packed_into(
    Tensor x, Tensor packed, OptionalTensor bias, OptionalTensor plus, int64_t out_channels, int64_t down,
    int64_t across, int64_t resize, int64_t shift, OptionalTensor skip, OptionalTensor norm, Tensor y) {
  const Convolved convolved(x, skip, out_channels, down, across, resize, shift);
  convolve_into(convolved, x, packed, {bias, plus, skip, norm}, y);
}

Tensor conv3x3_packed_cpu(
    Tensor x, Tensor packed, OptionalTensor bias, OptionalTensor plus, int64_t out_channels, int64_t down,
    int64_t across, int64_t resize, int64_t shift, OptionalTensor skip, OptionalTensor norm) {
  const Convolved convolved(x, skip, out_channels, down, across, resize, shift);
  const Tensor y =
      convolved.empty(x, is_channels_last(x) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  convolve_into(convolved, x, packed, {bias, plus, skip, norm}, y);
  return y;
}

Tensor packed_now(const Tensor& weight, bool turned, int64_t down, int64_t across) {
  check(weight.dim() == 4, "weight must be (C_out, C_in, 3, 3)");
  const Conv3x3Kernels& kernels = kernels_of(weight.scalar_type(), down, across);
  const Conv3x3Plan plan =
      kernels.plan({1, 1, 1, weight.size(turned ? 0 : 1), weight.size(turned ? 1 : 0)}, 1);
  const Tensor packed = torch::stable::new_empty(weight, {packed_elements(plan, weight.scalar_type())});
  pack(kernels, weight, turned, packed);
  return packed;
}

Tensor conv3x3_cpu(
    Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor plus, int64_t down, int64_t across) {
  check(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1), "weight must have x's channels");
  const Tensor packed = packed_now(weight, /*turned=*/false, down, across);
  return conv3x3_packed_cpu(x, packed, bias, plus, weight.size(0), down, across, 0, 0, {}, {});
}

// To its input a convolution's gradient is the convolution with the weight turned.
Tensor conv3x3_input_gradient_cpu(Tensor grad, Tensor weight, int64_t down, int64_t across) {
  check(
      grad.dim() == 4 && weight.dim() == 4 && weight.size(0) == grad.size(1),
      "weight must have grad's channels");
  const Tensor packed = packed_now(weight, /*turned=*/true, down, across);
  return conv3x3_packed_cpu(grad, packed, {}, {}, weight.size(1), down, across, 0, 0, {}, {});
}

int64_t linear_packed_size_cpu(int64_t in_features, int64_t out_features, ScalarType dtype) {
  return packed_size(for_rows(dtype), in_features, out_features);
}

void linear_pack_cpu(Tensor weight, Tensor packed) {
  check(weight.dim() == 2 && weight.numel() > 0, "weight must be (C_out, C_in)");
  const ScalarType dtype = weight.scalar_type();
  const Conv3x3Kernels& kernels = for_rows(dtype);
  weight = as_floats(as_contiguous(weight));
  const int64_t in_features = weight.size(1);
  pack(kernels, dtype, {floats(weight), in_features, 1, 0}, in_features, weight.size(0), packed);
}

void check_rows(const Tensor& x, int64_t out_features) {
  check(x.dim() == 2 && x.numel() > 0, "x must be (N, C) and not empty");
  check(out_features > 0, "out_features must be positive");
}

void linear_packed_into(
    Tensor x, Tensor packed, OptionalTensor bias, OptionalTensor plus, int64_t out_features,
    OptionalTensor skip, OptionalTensor norm, Tensor y) {
  check_rows(x, out_features);
  const int64_t rows = x.size(0), images = norm ? norm->size(0) : 1, features = channels_of(x, skip);
  check(images > 0 && rows % images == 0, "norm must be of images of as many rows each");
  x = as_contiguous(x);
  if (skip) skip = as_contiguous(*skip);
  if (plus) {
    check_like("plus", *plus, y, "the result");
    plus = as_contiguous(*plus);
  }
  const Conv3x3Shape shape = {images, 1, rows / images, features, out_features};
  convolve(for_rows(x.scalar_type()), shape, x, packed, {bias, plus, skip, norm}, /*silu=*/false, y);
}

Tensor linear_packed_cpu(
    Tensor x, Tensor packed, OptionalTensor bias, OptionalTensor plus, int64_t out_features,
    OptionalTensor skip, OptionalTensor norm) {
  check_rows(x, out_features);
  const Tensor y = torch::stable::new_empty(x, {x.size(0), out_features});
  linear_packed_into(x, packed, bias, plus, out_features, skip, norm, y);
  return y;
}

const bool in_programs = runs_in_programs<conv3x3_packed_into>("conv3x3_packed") &&
                         runs_in_programs<linear_packed_into>("linear_packed");

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
