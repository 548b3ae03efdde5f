// The direct convolution of bfloat16 on AMX, and the linear layer, without a transform of anything.
//
// Images lie in a raster, one after another, with a column of zeros after each row and a row of them after
// each image: whatever the tap, what 16 outputs in a row of the raster read are 16 pixels in a row, some
// steps away. So a block of the raster is copied once, as [32 channels][pixel], and its tiles are loaded from
// wherever they begin. Outputs that fall on the zeros are left out. Weights are [panel][32
// channels][tap][half], one stream; the sums over all of them stay in tiles.
#pragma once

#include "amx_bfloat16.h"
#include "conv3x3.h"

namespace ddpm_fast::cpu {
namespace {

template <int kTaps>
struct Conv3x3AmxDirect : Conv3x3<1, 1, kTaps, BFloat16> {
  using Base = Conv3x3<1, 1, kTaps, BFloat16>;
  static constexpr int kPositions = kTaps * kTaps, kMargin = kTaps / 2;
  static constexpr int64_t kMost = 576;                  // of the raster in a block
  static constexpr int64_t kChunk = kTaps == 1 ? 8 : 2;  // of 32 channels: their weights fit the first cache

  // Few channels are left to vectors: most of a tile would be empty.
  static bool is_narrow(const Conv3x3Shape& shape) { return shape.in_channels < kWidth; }

  static int64_t depth(const Conv3x3Plan& plan) { return ceil_div(plan.in_channels, kWidth); }

  // The raster's rows and their length.
  static int64_t pitch(const Conv3x3Shape& shape) { return shape.width + kMargin; }
  static int64_t lines(const Conv3x3Shape& shape) { return shape.height + kMargin; }

  // Pixels that a block reads, and bytes of them to the next 32 channels; with a line: powers of two would
  // share a few sets of the cache. After them, where each output of the block goes.
  static int64_t reads(const Conv3x3Plan& plan) { return plan.block + 2 * kMargin * (pitch(plan) + 1); }
  static int64_t a_stride(const Conv3x3Plan& plan) { return (reads(plan) + 1) * 64; }

  static Conv3x3Plan plan(const Conv3x3Shape& shape, int64_t threads) {
    if (is_narrow(shape)) return Base::plan(shape, threads);
    Conv3x3Plan plan = {};
    static_cast<Conv3x3Shape&>(plan) = shape;
    plan.tiles = (shape.batch * lines(shape) - kMargin) * pitch(shape) - kMargin;
    plan.blocks = ceil_div(plan.tiles, kMost);
    if (plan.blocks > threads) plan.blocks = ceil_div(plan.blocks, threads) * threads;
    plan.block = ceil_div(ceil_div(plan.tiles, plan.blocks), 32) * 32;
    plan.blocks = ceil_div(plan.tiles, plan.block);
    plan.panels = ceil_div(plan.out_channels, kPanel);
    plan.panel_size = kPositions * depth(plan) * kTwoTiles / sizeof(float);
    plan.packed = plan.panels * plan.panel_size;
    plan.transformed = depth(plan) * a_stride(plan) / sizeof(float) + plan.block;
    plan.products = plan.block * kPanel;
    plan.scratch = kPositions * depth(plan) * kWidth;
    return plan;
  }

  static void pack(
      const Conv3x3Plan& plan, const Conv3x3Weight<const float>& weight, int64_t first, int64_t last,
      float* packed, float* scratch) {
    if (is_narrow(plan)) return Base::pack(plan, weight, first, last, packed, scratch);
    pack_bfloat16<Base>(plan, weight, first, last, packed, scratch, [](int position, int64_t c) {
      return c * kPositions + position;
    });
  }

  // The share of a block's pixels that [first, last) is of its outputs.
  static void transform(
      const Conv3x3Plan& plan, const void* x, int64_t block, int64_t first, int64_t last, float* transformed,
      float* scratch) {
    if (is_narrow(plan)) return Base::transform(plan, x, block, first, last, transformed, scratch);
    auto* const to = reinterpret_cast<char*>(transformed);
    auto* const outputs = reinterpret_cast<int32_t*>(to + depth(plan) * a_stride(plan));
    const int64_t start = block * plan.block;
    for (Walk at(plan, start + first); at.place < start + last; ++at) {
      outputs[at.place - start] = at.place < plan.tiles && at.inside() ? at.pixel() : -1;
    }
    const int64_t channels = plan.in_channels, whole = channels / kWidth * kWidth;
    const int64_t begin = reads(plan) * first / plan.block, end = reads(plan) * last / plan.block;
    const int64_t before = kMargin * (pitch(plan) + 1);  // the first output's first tap
    for (Walk at(plan, start + begin - before); at.place < start + end - before; ++at) {
      char* pixel = to + (at.place - start + before) * 64;
      if (at.inside()) {
        const auto* from = static_cast<const BFloat16*>(x) + at.pixel() * channels;
        for (int64_t c = 0; c < whole; c += kWidth, pixel += a_stride(plan)) std::memcpy(pixel, from + c, 64);
        if (whole < channels) {
          std::memset(pixel, 0, 64);
          std::memcpy(pixel, from + whole, (channels - whole) * sizeof(BFloat16));
        }
      } else {
        for (int64_t c = 0; c < channels; c += kWidth, pixel += a_stride(plan)) std::memset(pixel, 0, 64);
      }
    }
  }

  // Along the raster.
  struct Walk {
    const Conv3x3Plan& plan;
    int64_t place, image, row, column;

    Walk(const Conv3x3Plan& of, int64_t from) : plan(of), place(from) {
      const int64_t size = lines(plan) * pitch(plan),
                    ahead = from + size;  // from may be before the first image
      image = ahead / size - 1;
      row = ahead % size / pitch(plan);
      column = ahead % size % pitch(plan);
    }

    void operator++() {
      ++place;
      if (++column < pitch(plan)) return;
      column = 0;
      if (++row < lines(plan)) return;
      row = 0;
      ++image;
    }

    bool inside() const {
      return image >= 0 && image < plan.batch && row < plan.height && column < plan.width;
    }
    int64_t pixel() const { return (image * plan.height + row) * plan.width + column; }
  };

  // A chunk of the weights, which fits the first cache, is multiplied with all outputs of the block before
  // the next one; sums wait in m. The last ones are written beside the next outputs' multiplication: vectors
  // and tiles are different units of the processor.
  class Sums {
   public:
    Sums(const Conv3x3Plan& plan, const int32_t* outputs)
        : a_stride_(a_stride(plan)), pitch_(pitch(plan) * 64), outputs_(outputs) {}

    // Outputs [row, row + 32), or 16 of them, by a chunk of `depth` times 32 channels.
    template <int kRowTiles>
    void multiply(const char* a, const char* b, int64_t depth, float* m, bool adds) {
      adds ? load_sums<kRowTiles>(m) : zero_sums();
      for (; depth > 0; --depth, a += a_stride_) {
        for (int i = 0; i < kTaps; ++i) {
          for (int j = 0; j < kTaps; ++j, b += kTwoTiles) {
            add_products<kRowTiles>(a + i * pitch_ + j * 64, b);
            for (const char* const last = ahead_ + ahead_step_; ahead_ < last; ahead_ += 64) {
              __builtin_prefetch(ahead_, 0, 2);
            }
            write(kAtOnce);
          }
        }
      }
      write(32);
      store_sums<kRowTiles>(m);
    }

    void prefetch(const char* ahead, int64_t step) { ahead_ = ahead, ahead_step_ = step; }

    void wrote_to(const PanelOutput& to) { to_ = to; }

    void pending(const float* m, int64_t row, int64_t last) { m_ = m, row_ = row, last_ = last; }

    void finish() { write(32); }

   private:
    static constexpr int kAtOnce = 4;  // outputs that are written after a step

    inline void write(int count) {
      for (; count > 0 && row_ < last_; --count, ++row_, m_ += kPanel) {
        const int32_t pixel = outputs_[row_];
        if (pixel >= 0) to_.write(pixel, load(m_), load(m_ + kLanes));
      }
    }

    const int64_t a_stride_, pitch_;
    const int32_t* const outputs_;
    const char* ahead_ = nullptr;
    int64_t ahead_step_ = 0;
    PanelOutput to_;
    const float* m_ = nullptr;
    int64_t row_ = 0, last_ = 0;
  };

  static void run(
      const Conv3x3Plan& plan, const float* transformed, const float* packed, const float* bias,
      const void* plus, void* y, int64_t block, int64_t first, int64_t last, float* products) {
    if (is_narrow(plan)) {
      return Base::run(plan, transformed, packed, bias, plus, y, block, first, last, products);
    }
    const Tiles configured;
    const auto* const a = reinterpret_cast<const char*>(transformed);
    const auto* const outputs = reinterpret_cast<const int32_t*>(a + depth(plan) * a_stride(plan));
    const int64_t tiles = tiles_in(plan, block), pairs = ceil_div(tiles, 32);
    const int64_t most = pairs == 1 ? depth(plan) : kChunk;  // of one pair the sums stay in tiles
    const auto* b = reinterpret_cast<const char*>(packed + first * plan.panel_size);
    Sums sums(plan, outputs);
    for (int64_t panel = first; panel < last; ++panel) {
      for (int64_t c = 0; c < depth(plan); c += most) {
        const int64_t deep = depth(plan) - c < most ? depth(plan) - c : most;
        const int64_t bytes = deep * kPositions * kTwoTiles;
        sums.prefetch(b + bytes, ceil_div(bytes, pairs * deep * kPositions * 64) * 64);
        for (int64_t row = 0; row < tiles; row += 32) {
          const char* const pixels = a + c * a_stride(plan) + row * 64;
          float* const m = products + row * kPanel;
          tiles - row > 16 ? sums.template multiply<2>(pixels, b, deep, m, c > 0)
                           : sums.template multiply<1>(pixels, b, deep, m, c > 0);
          if (c + deep == depth(plan)) {
            if (row == 0) sums.wrote_to(PanelOutput(plan, panel, bias, plus, y));
            sums.pending(m, row, tiles - row < 32 ? tiles : row + 32);
          }
        }
        b += bytes;
      }
    }
    sums.finish();
  }

  static constexpr Conv3x3Kernels kKernels = {kTaps, 1, 1, plan, pack, transform, run};
};

}  // namespace
}  // namespace ddpm_fast::cpu
