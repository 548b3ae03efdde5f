// The direct convolution of bfloat16 on AMX, and the linear layer, without a transform of anything.
//
// Images lie in a raster, one after another, with a column of zeros after each row and a row of them after
// each image: whatever the tap, what 16 outputs in a row of the raster read are 16 pixels in a row, some
// steps away. So a block of the raster is copied once, as [32 channels][pixel], and its tiles are loaded from
// wherever they begin. Outputs that fall on the zeros are left out. Weights are [panel][32
// channels][tap][half].
#pragma once

#include "amx_bfloat16.h"
#include "conv3x3.h"

namespace ddpm_fast::cpu {
namespace {

// Where a panel's 32 output channels of a pixel go.
struct PanelOutput {
  Float bias[2] = {};
  const BFloat16* plus = nullptr;  // as y, or null
  BFloat16* y = nullptr;
  int64_t channels = 0;  // from a pixel to the next
  __mmask32 inside = 0;  // which of the panel's there are

  PanelOutput() = default;

  PanelOutput(const Conv3x3Plan& plan, int64_t panel, const float* bias_, const void* plus_, void* y_)
      : channels(plan.out_channels) {
    const int64_t k = panel * kPanel, left = channels - k;
    plus = plus_ == nullptr ? nullptr : static_cast<const BFloat16*>(plus_) + k;
    y = static_cast<BFloat16*>(y_) + k;
    inside = left < kPanel ? (1u << left) - 1 : ~0u;
    for (int half = 0; half < 2 && bias_ != nullptr && left > half * kLanes; ++half) {
      const float* const from = bias_ + k + half * kLanes;
      bias[half] = left < (half + 1) * kLanes ? load(from, left - half * kLanes) : load(from);
    }
  }

  inline void write(int64_t pixel, Float first, Float second) const {
    first += bias[0], second += bias[1];
    const int64_t at = pixel * channels;
    if (plus != nullptr) {
      const __m512i both = _mm512_maskz_loadu_epi16(inside, plus + at);
      first += widened(_mm512_castsi512_si256(both));
      second += widened(_mm512_extracti64x4_epi64(both, 1));
    }
    const __m512bh rounded = _mm512_cvtne2ps_pbh(second, first);
    _mm512_mask_storeu_epi16(y + at, inside, bit_cast<__m512i>(rounded));
  }

  static inline Float widened(__m256i halves) {
    return bit_cast<Float>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
};

template <int kTaps>
struct Conv3x3AmxDirect : Conv3x3<1, 1, kTaps, Resize::kNone, BFloat16> {
  using Base = Conv3x3<1, 1, kTaps, Resize::kNone, BFloat16>;
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
    plan.out_height = plan.height, plan.out_width = plan.width;
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
    plan.pixels = Preparation<BFloat16>::size(plan);
    return plan;
  }

  static void pack(
      const Conv3x3Plan& plan, const Conv3x3Weight<const float>& weight, int64_t first, int64_t last,
      float* packed, float* scratch) {
    if (is_narrow(plan)) return Base::pack(plan, weight, first, last, packed, scratch);
    const int64_t channels = depth(plan) * kWidth;
    for (int64_t panel = first; panel < last; ++panel) {
      Base::lay_out_weights(plan, weight, panel, channels, scratch, [](int, int, Float) {});
      auto* to = reinterpret_cast<BFloat16*>(packed + panel * plan.panel_size);
      for (int64_t c = 0; c < channels; c += kWidth) {
        for (int position = 0; position < kPositions; ++position) {
          for (int line = 0; line < 32; ++line, to += 2 * kLanes) {
            const int64_t channel = position * channels + c + 2 * (line % 16);
            const float* const u = scratch + channel * kPanel + line / 16 * kLanes;
            store_pair(to, {load(u), load(u + kPanel)});
          }
        }
      }
    }
  }

  static void begin(const Conv3x3Plan& plan, const Conv3x3Input& from, float* scratch) {
    if (is_narrow(plan)) return Base::begin(plan, from, scratch);
    Preparation<BFloat16>(plan, from, scratch + plan.scratch).clear();
    std::memset(scratch, 0, depth(plan) * kWidth * sizeof(float));
  }

  // The share of a block's pixels that [first, last) is of its outputs.
  static void transform(
      const Conv3x3Plan& plan, const Conv3x3Input& from, int64_t block, int64_t first, int64_t last,
      float* transformed, float* scratch) {
    if (is_narrow(plan)) return Base::transform(plan, from, block, first, last, transformed, scratch);
    auto* const to = reinterpret_cast<char*>(transformed);
    auto* const outputs = reinterpret_cast<int32_t*>(to + depth(plan) * a_stride(plan));
    const int64_t start = block * plan.block;
    for (Walk at(plan, start + first); at.place < start + last; ++at) {
      outputs[at.place - start] = at.place < plan.tiles && at.inside() ? at.pixel() : -1;
    }
    const int64_t channels = plan.in_channels;
    const int64_t begin = reads(plan) * first / plan.block, end = reads(plan) * last / plan.block;
    const int64_t before = kMargin * (pitch(plan) + 1);  // the first output's first tap
    const Preparation<BFloat16> preparation(plan, from, scratch + plan.scratch);
    for (Walk at(plan, start + begin - before); at.place < start + end - before; ++at) {
      char* const pixel = to + (at.place - start + before) * 64;
      if (!at.inside()) {
        for (int64_t k = 0; k < depth(plan); ++k) std::memset(pixel + k * a_stride(plan), 0, 64);
      } else if (from.is_plain()) {
        put(plan, pixel, static_cast<const BFloat16*>(from.x) + at.pixel() * channels);
      } else {
        preparation.prepare(at.image, at.pixel(), scratch);
        put(plan, pixel, scratch);
      }
    }
  }

  static inline void put(const Conv3x3Plan& plan, char* to, const BFloat16* x) {
    const int64_t channels = plan.in_channels, whole = channels / kWidth * kWidth;
    for (int64_t c = 0; c < whole; c += kWidth, to += a_stride(plan)) std::memcpy(to, x + c, 64);
    if (whole == channels) return;
    std::memset(to, 0, 64);
    std::memcpy(to, x + whole, (channels - whole) * sizeof(BFloat16));
  }

  // Of x's channels there are zeros up to the next 32.
  static inline void put(const Conv3x3Plan& plan, char* to, const float* x) {
    for (int64_t c = 0; c < plan.in_channels; c += kWidth, to += a_stride(plan)) {
      const __m512bh rounded = _mm512_cvtne2ps_pbh(load(x + c + kLanes), load(x + c));
      std::memcpy(to, &rounded, sizeof(rounded));
    }
  }

  // Along the raster.
  struct Walk {
    const Conv3x3Plan& plan;
    int64_t place, image, row, column;

    Walk(const Conv3x3Plan& of, int64_t from) : plan(of), place(from) {
      const int64_t size = lines(plan) * pitch(plan);
      const int64_t ahead = from + size;  // it may be before the first image
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

  // Sums of 32 outputs, or 16, wait in m while others are multiplied with the same weights. When they are
  // whole they are written beside the next ones' multiplication, some after each step: vectors and tiles are
  // different units of the processor.
  class Sums {
   public:
    Sums(const Conv3x3Plan& plan, const int32_t* outputs)
        : a_stride_(a_stride(plan)), pitch_(pitch(plan) * 64), outputs_(outputs) {}

    // With `depth` times 32 channels.
    template <int kRowTiles>
    void multiply(const char* a, const char* b, int64_t depth, float* m, bool adds) {
      adds ? load_sums<kRowTiles>(m) : zero_sums();
      for (; depth > 0; --depth, a += a_stride_) {
        for (int i = 0; i < kTaps; ++i) {
          for (int j = 0; j < kTaps; ++j, b += kTwoTiles) {
            const char* const tap = a + i * pitch_ + j * 64;
            add_products<kRowTiles>(tap, tap + kTile, b, b + kTile);
            for (const char* const last = ahead_ + ahead_step_; ahead_ < last; ahead_ += 64) {
              __builtin_prefetch(ahead_, 0, 2);
            }
            write(4);
          }
        }
      }
      finish();
      store_sums<kRowTiles>(m);
    }

    // Weights that are wanted next are brought to the second cache, `step` bytes after each step.
    void prefetch(const char* ahead, int64_t step) { ahead_ = ahead, ahead_step_ = step; }

    // The sums of outputs [row, last) are whole.
    void complete(const PanelOutput& to, const float* m, int64_t row, int64_t last) {
      to_ = to, m_ = m, row_ = row, last_ = last;
    }

    void finish() { write(32); }

   private:
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

  // A chunk of the weights, which fits the first cache, is multiplied with all outputs of the block before
  // the next one.
  static void run(
      const Conv3x3Plan& plan, const float* transformed, const float* packed, const float* bias,
      const void* plus, void* y, int64_t block, int64_t first, int64_t last, float* products) {
    if (is_narrow(plan)) {
      return Base::run(plan, transformed, packed, bias, plus, y, block, first, last, products);
    }
    const Tiles configured;
    const auto* const a = reinterpret_cast<const char*>(transformed);
    const auto* const outputs = reinterpret_cast<const int32_t*>(a + depth(plan) * a_stride(plan));
    const int64_t tiles = tiles_in(plan, block);
    const int64_t chunk = tiles <= 32 ? depth(plan) : kChunk;  // of 32 outputs the sums never have to wait
    const auto* b = reinterpret_cast<const char*>(packed + first * plan.panel_size);
    Sums sums(plan, outputs);
    for (int64_t panel = first; panel < last; ++panel) {
      const PanelOutput to(plan, panel, bias, plus, y);
      for (int64_t c = 0; c < depth(plan); c += chunk) {
        const int64_t deep = depth(plan) - c < chunk ? depth(plan) - c : chunk;
        const int64_t steps = deep * kPositions, bytes = steps * kTwoTiles;
        sums.prefetch(b + bytes, ceil_div(bytes, ceil_div(tiles, 32) * steps * 64) * 64);
        for (int64_t row = 0; row < tiles; row += 32) {
          const char* const pixels = a + c * a_stride(plan) + row * 64;
          float* const m = products + row * kPanel;
          tiles - row > 16 ? sums.template multiply<2>(pixels, b, deep, m, c > 0)
                           : sums.template multiply<1>(pixels, b, deep, m, c > 0);
          if (c + deep == depth(plan)) sums.complete(to, m, row, tiles - row < 32 ? tiles : row + 32);
        }
        b += bytes;
      }
    }
    sums.finish();
  }

  static constexpr Conv3x3Kernels kKernels = {kTaps, 1, 1, Resize::kNone, plan, pack, begin, transform, run};
};

}  // namespace
}  // namespace ddpm_fast::cpu
