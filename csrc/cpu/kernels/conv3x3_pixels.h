// Where a convolution finds the pixels of its input: in x as they lie, or prepared. A norm and its SiLU are
// worked out for a pixel once, when a tile first asks for it, though the tiles around it share it; and the
// channels of a second source are put after those of the first, so that their concatenation is nowhere built.
#pragma once

#include "../kernels.h"
#include "group_norm_silu.h"

namespace ddpm_fast::cpu {
namespace {

struct PlainPixels {
  const Conv3x3Plan& plan;
  const float* x;

  const float* at(int64_t image, int64_t row, int64_t column) const {
    return x + ((image * plan.height + row) * plan.width + column) * plan.in_channels;
  }
};

// A ring of rows of pixels, as many as a tile of kRows x kColumns inputs has, and as wide as a block of tiles
// can be, each kAcross further than the one before.
template <int kRows, int kColumns, int kAcross>
class PreparedPixels {
 public:
  PreparedPixels(const Conv3x3Plan& plan, const Conv3x3Input& from, float* memory)
      : plan_(plan), from_(from), width_(width(plan)), pixels_(memory) {
    held_ = reinterpret_cast<int64_t*>(memory + kRows * width_ * stride(plan));
    for (int64_t slot = 0; slot < kRows * width_; ++slot) held_[slot] = -1;
  }

  // Of the memory, in floats.
  static int64_t size(const Conv3x3Plan& plan) {
    return kRows * width(plan) * (stride(plan) + sizeof(int64_t) / sizeof(float));
  }

  const float* at(int64_t image, int64_t row, int64_t column) {
    const uint32_t across = static_cast<uint32_t>(column) % static_cast<uint32_t>(width_);
    const int64_t slot = row % kRows * width_ + across;
    const int64_t pixel = (image * plan_.height + row) * plan_.width + column;
    float* const to = pixels_ + slot * stride(plan_);
    if (held_[slot] != pixel) {
      held_[slot] = pixel;
      prepare(image, pixel, to);
    }
    return to;
  }

 private:
  static int64_t stride(const Conv3x3Plan& plan) { return (plan.in_channels + 15) / 16 * 16; }

  static int64_t width(const Conv3x3Plan& plan) {
    if (kColumns == 1) return 1;  // tiles share no pixel
    const int64_t most = plan.block * kAcross + kColumns - kAcross;
    return most < plan.width ? most : plan.width;
  }

  void prepare(int64_t image, int64_t pixel, float* to) const {
    const int64_t channels = plan_.in_channels, rest = channels - from_.split;
    const float* const fold = from_.fold == nullptr ? nullptr : from_.fold + 3 * image * channels;
    prepare(from_.x + pixel * from_.split, from_.split, fold, to);
    if (rest > 0) {
      prepare(from_.skip + pixel * rest, rest, fold == nullptr ? nullptr : fold + from_.split, to + from_.split);
    }
  }

  void prepare(const float* x, int64_t channels, const float* fold, float* to) const {
    if (fold == nullptr) {
      std::memcpy(to, x, channels * sizeof(float));
    } else if (from_.silu) {
      normalise<Act::kSilu>(x, channels, fold, to);
    } else {
      normalise<Act::kNone>(x, channels, fold, to);
    }
  }

  template <Act kAct>
  void normalise(const float* x, int64_t channels, const float* fold, float* to) const {
    const auto some = [&](int64_t c, auto registers, const auto& get, const auto& put) {
      Float v[registers];
      for (int k = 0; k < registers; ++k) v[k] = get(x + c + k * kLanes);
      const auto number = [&](int64_t row) {
        return [&get, from = fold + row * plan_.in_channels + c](int k) { return get(from + k * kLanes); };
      };
      apply<kAct, float>(v, number(0), number(1), number(2));
      for (int k = 0; k < registers; ++k) put(to + c + k * kLanes, v[k]);
    };
    const auto get = [](const float* from) { return load(from); };
    const auto put = [](float* into, Float value) { store(into, value); };
    int64_t c = 0;
    for (; c + 4 * kLanes <= channels; c += 4 * kLanes) some(c, std::integral_constant<int, 4>(), get, put);
    for (; c + kLanes <= channels; c += kLanes) some(c, std::integral_constant<int, 1>(), get, put);
    const int64_t left = channels - c;
    if (left == 0) return;
    some(
        c, std::integral_constant<int, 1>(), [left](const float* from) { return load(from, left); },
        [left](float* into, Float value) { store(into, value, left); });
  }

  const Conv3x3Plan& plan_;
  const Conv3x3Input& from_;
  int64_t width_;
  float* pixels_;
  int64_t* held_;  // the pixel that is in each place
};

}  // namespace
}  // namespace ddpm_fast::cpu
