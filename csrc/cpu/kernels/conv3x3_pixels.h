// Where a convolution finds the pixels of its input: in x as they lie, or prepared. A norm and its SiLU are
// worked out for a pixel once, when a tile first asks for it, though the tiles around it share it; and the
// channels of a second source are put after those of the first, so that their concatenation is nowhere built.
#pragma once

#include "../kernels.h"
#include "group_norm_silu.h"

namespace ddpm_fast::cpu {
namespace {

template <typename T>
struct PlainPixels {
  using Value = T;
  const Conv3x3Plan& plan;
  const T* x;

  const T* at(int64_t image, int64_t row, int64_t column) const {
    return x + ((image * plan.height + row) * plan.width + column) * plan.in_channels;
  }
};

// Works pixels out, with an image's numbers at hand. It is in a thread's memory, which says whose they are.
template <typename T>
class Preparation {
 public:
  Preparation(const Conv3x3Plan& plan, const Conv3x3Input& from, float* memory)
      : plan_(plan), from_(from), numbers_(memory) {
    held_ = reinterpret_cast<Held*>(numbers_ + kNumbers * stride(plan));
  }

  // Of the memory, in floats; and of a pixel.
  static int64_t size(const Conv3x3Plan& plan) {
    return kNumbers * stride(plan) + sizeof(Held) / sizeof(float);
  }
  static int64_t stride(const Conv3x3Plan& plan) { return (plan.in_channels + 15) / 16 * 16; }

  void clear() { held_->image = -1; }

  // All channels of an image's pixel, which is the `pixel`-th of the batch.
  void prepare(int64_t image, int64_t pixel, float* to) const {
    if (from_.fold != nullptr && held_->image != image) take_numbers(image);
    const int64_t split = from_.split, rest = plan_.in_channels - split;
    prepare(static_cast<const T*>(from_.x) + pixel * split, split, numbers_, to);
    if (rest > 0) {
      prepare(static_cast<const T*>(from_.skip) + pixel * rest, rest, numbers_ + split, to + split);
    }
  }

 private:
  static constexpr int64_t kNumbers = 3;  // of a channel

  struct Held {
    int64_t image;  // whose numbers are there
    int64_t act;    // that they are for
  };

  void take_numbers(int64_t image) const {
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

  void prepare(const T* x, int64_t channels, const float* numbers, float* to) const {
    if (from_.fold == nullptr) {
      each(channels, [&](int64_t c, auto registers, const auto& get, const auto& put) {
        for (int k = 0; k < registers; ++k) put(to + c + k * kLanes, get(x + c + k * kLanes));
      });
      return;
    }
    for_act(static_cast<Act>(held_->act), [&](auto act) { normalise<act>(x, channels, numbers, to); });
  }

  template <Act kAct>
  void normalise(const T* x, int64_t channels, const float* numbers, float* to) const {
    each(channels, [&](int64_t c, auto registers, const auto& get, const auto& put) {
      constexpr int kRegisters = registers;
      Float v[kRegisters];
      for (int k = 0; k < kRegisters; ++k) v[k] = get(x + c + k * kLanes);
      const auto number = [&](int64_t row) {
        return [&get, from = numbers + row * stride(plan_) + c](int k) { return get(from + k * kLanes); };
      };
      apply<kAct, T>(v, number(0), number(1), number(2));
      for (int k = 0; k < kRegisters; ++k) put(to + c + k * kLanes, v[k]);
    });
  }

  // Calls some(channel, count of registers, get, put) for all channels.
  template <typename Some>
  static inline void each(int64_t channels, const Some& some) {
    using One = std::integral_constant<int, 1>;
    const auto get = [](const auto* from) { return load(from); };
    const auto put = [](float* into, Float value) { store(into, value); };
    int64_t c = 0;
    for (; c + 4 * kLanes <= channels; c += 4 * kLanes) some(c, std::integral_constant<int, 4>(), get, put);
    for (; c + kLanes <= channels; c += kLanes) some(c, One(), get, put);
    const int64_t left = channels - c;
    if (left == 0) return;
    some(
        c, One(), [left](const auto* from) { return load(from, left); },
        [left](float* into, Float value) { store(into, value, left); });
  }

  const Conv3x3Plan& plan_;
  const Conv3x3Input& from_;
  float* numbers_;
  Held* held_;
};

// A ring of rows of pixels, as many as a tile of kRows x kColumns inputs has, and as wide as a block of tiles
// can be, each kStep further than the one before. It serves one block after another, from `clear` on.
template <typename T, int kRows, int kColumns, int kStep>
class PreparedPixels {
 public:
  using Value = float;

  PreparedPixels(const Conv3x3Plan& plan, const Conv3x3Input& from, float* memory)
      : plan_(plan),
        width_(width(plan)),
        pixels_(memory + Preparation<T>::size(plan)),
        preparation_(plan, from, memory) {
    held_ = reinterpret_cast<int64_t*>(pixels_ + kRows * width_ * Preparation<T>::stride(plan));
  }

  // Of the memory, in floats.
  static int64_t size(const Conv3x3Plan& plan) {
    const int64_t places = kRows * width(plan);
    return Preparation<T>::size(plan) + places * Preparation<T>::stride(plan) +
           places * sizeof(int64_t) / sizeof(float);
  }

  void clear() {
    preparation_.clear();
    for (int64_t slot = 0; slot < kRows * width_; ++slot) held_[slot] = -1;
  }

  const float* at(int64_t image, int64_t row, int64_t column) {
    const uint32_t across = static_cast<uint32_t>(column) % static_cast<uint32_t>(width_);
    const int64_t slot = row % kRows * width_ + across;
    const int64_t pixel = (image * plan_.height + row) * plan_.width + column;
    float* const to = pixels_ + slot * Preparation<T>::stride(plan_);
    if (held_[slot] != pixel) {
      held_[slot] = pixel;
      preparation_.prepare(image, pixel, to);
    }
    return to;
  }

 private:
  static int64_t width(const Conv3x3Plan& plan) {
    if (kColumns == 1) return 1;  // tiles share no pixel
    const int64_t most = plan.block * kStep + kColumns - kStep;
    return most < plan.width ? most : plan.width;
  }

  const Conv3x3Plan& plan_;
  int64_t width_;
  float* pixels_;
  int64_t* held_;  // which pixel is in each place
  Preparation<T> preparation_;
};

}  // namespace
}  // namespace ddpm_fast::cpu
