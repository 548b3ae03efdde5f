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
// can be, each kAcross further than the one before. It is in a thread's memory, which says what it holds: it
// serves one block after another, from `clear` on.
template <int kRows, int kColumns, int kAcross>
class PreparedPixels {
 public:
  PreparedPixels(const Conv3x3Plan& plan, const Conv3x3Input& from, float* memory)
      : plan_(plan), from_(from), width_(width(plan)), pixels_(memory) {
    numbers_ = memory + kRows * width_ * stride(plan);
    held_ = reinterpret_cast<Held*>(numbers_ + kNumbers * stride(plan));
  }

  // Of the memory, in floats.
  static int64_t size(const Conv3x3Plan& plan) {
    const int64_t places = kRows * width(plan);
    return (places + kNumbers) * stride(plan) + (sizeof(Held) + places * sizeof(int64_t)) / sizeof(float);
  }

  void clear() {
    held_->image = -1;
    for (int64_t slot = 0; slot < kRows * width_; ++slot) held_->pixels[slot] = -1;
  }

  const float* at(int64_t image, int64_t row, int64_t column) {
    const uint32_t across = static_cast<uint32_t>(column) % static_cast<uint32_t>(width_);
    const int64_t slot = row % kRows * width_ + across;
    const int64_t pixel = (image * plan_.height + row) * plan_.width + column;
    float* const to = pixels_ + slot * stride(plan_);
    if (held_->pixels[slot] != pixel) {
      held_->pixels[slot] = pixel;
      if (from_.fold != nullptr && held_->image != image) take_numbers(image);
      prepare(pixel, to);
    }
    return to;
  }

 private:
  static constexpr int64_t kNumbers = 3;  // of a channel

  struct Held {
    int64_t image;     // whose numbers are there
    int64_t act;       // that they are for
    int64_t pixels[];  // in each place
  };

  static int64_t stride(const Conv3x3Plan& plan) { return (plan.in_channels + 15) / 16 * 16; }

  static int64_t width(const Conv3x3Plan& plan) {
    if (kColumns == 1) return 1;  // tiles share no pixel
    const int64_t most = plan.block * kAcross + kColumns - kAcross;
    return most < plan.width ? most : plan.width;
  }

  void take_numbers(int64_t image) {
    const int64_t channels = plan_.in_channels;
    const float* const fold = from_.fold + image * kFoldRows * channels;
    float* rows[kNumbers];
    for (int64_t k = 0; k < kNumbers; ++k) {
      rows[k] = numbers_ + k * stride(plan_);
      std::memcpy(rows[k], fold + k * channels, channels * sizeof(float));
    }
    held_->image = image;
    held_->act = static_cast<int64_t>(
        choose_act(from_.silu, channels, fold + kNumbers * channels, {rows[0], rows[1], rows[2]}));
  }

  void prepare(int64_t pixel, float* to) const {
    const int64_t split = from_.split, rest = plan_.in_channels - split;
    prepare(from_.x + pixel * split, split, numbers_, to);
    if (rest > 0) prepare(from_.skip + pixel * rest, rest, numbers_ + split, to + split);
  }

  void prepare(const float* x, int64_t channels, const float* numbers, float* to) const {
    if (from_.fold == nullptr) {
      std::memcpy(to, x, channels * sizeof(float));
      return;
    }
    for_act(static_cast<Act>(held_->act), [&](auto act) { normalise<act>(x, channels, numbers, to); });
  }

  template <Act kAct>
  void normalise(const float* x, int64_t channels, const float* numbers, float* to) const {
    const auto some = [&](int64_t c, auto registers, const auto& get, const auto& put) {
      constexpr int kRegisters = registers;
      Float v[kRegisters];
      for (int k = 0; k < kRegisters; ++k) v[k] = get(x + c + k * kLanes);
      const auto number = [&](int64_t row) {
        return [&get, from = numbers + row * stride(plan_) + c](int k) { return get(from + k * kLanes); };
      };
      apply<kAct, float>(v, number(0), number(1), number(2));
      for (int k = 0; k < kRegisters; ++k) put(to + c + k * kLanes, v[k]);
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
  float *pixels_, *numbers_;
  Held* held_;
};

}  // namespace
}  // namespace ddpm_fast::cpu
