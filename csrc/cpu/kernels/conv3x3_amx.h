// conv3x3.h's convolution with its products on AMX, of numbers as digits: see amx_digits.h. Tiles, their
// transforms and what becomes of the products are the same. A tile's channels at each position are a row with
// a unit of its own, an output channel's weights at each position a column with one.
#pragma once

#include "amx_gemm.h"
#include "conv3x3.h"

namespace ddpm_fast::cpu {
namespace {

template <int kDown, int kAcross, int kTaps = 3, Resize kResize = Resize::kNone>
struct Conv3x3Amx : Conv3x3<kDown, kAcross, kTaps, kResize> {
  using Base = Conv3x3<kDown, kAcross, kTaps, kResize>;
  using Base::kColumns, Base::kRows;
  static constexpr int kPositions = kRows * kColumns;
  static constexpr int64_t kMost = kTaps == 1 ? 256 : 64;  // tiles of a block

  static constexpr int64_t kTogether = 4;  // panels of one pass over a block's tiles
  static constexpr int64_t kAhead = 8192;  // bytes, of weights that are read in order

  // Few channels are left to vectors: most of a tile would be empty, and their float32 errs by less.
  static bool is_narrow(const Conv3x3Shape& shape) { return shape.in_channels < kDepth; }

  static int64_t depth(const Conv3x3Plan& plan) { return ceil_div(plan.in_channels, kDepth); }

  // In bytes, of a position. A panel's weights: digits, and the columns' units.
  static int64_t b_digits(const Conv3x3Plan& plan) { return depth(plan) * 2 * kDigits * kTile; }
  static int64_t b_stride(const Conv3x3Plan& plan) { return b_digits(plan) + kPanel * sizeof(float); }

  // A block's tiles: digits, the rows' units, and a line: powers of two would share a few sets of the cache.
  static int64_t a_digits(const Conv3x3Plan& plan) {
    return ceil_div(plan.block, 16) * depth(plan) * kDigits * kTile;
  }
  static int64_t a_stride(const Conv3x3Plan& plan) {
    return a_digits(plan) + ceil_div(plan.block, 16) * 16 * sizeof(float) + 64;
  }

  static Conv3x3Plan plan(const Conv3x3Shape& shape, int64_t threads) {
    if (is_narrow(shape)) return Base::plan(shape, threads);
    Conv3x3Plan plan = Base::cut(shape, threads, kMost);
    plan.panel_size = kPositions * b_stride(plan) / sizeof(float);
    plan.packed = plan.panels * plan.panel_size;
    plan.transformed = kPositions * a_stride(plan) / sizeof(float);
    plan.products *= kTogether;
    plan.scratch = kPositions * depth(plan) * kDepth;
    return plan;
  }

  static void pack(
      const Conv3x3Plan& plan, const Conv3x3Weight<const float>& weight, int64_t first, int64_t last,
      float* packed, float* scratch) {
    if (is_narrow(plan)) return Base::pack(plan, weight, first, last, packed, scratch);
    const int64_t channels = depth(plan) * kDepth;
    for (int64_t panel = first; panel < last; ++panel) {
      Magnitude largest[kPositions][2];
      Base::lay_out_weights(plan, weight, panel, channels, scratch, [&](int position, int half, Float u) {
        largest[position][half].see(u);
      });
      auto* const to = reinterpret_cast<int8_t*>(packed + panel * plan.panel_size);
      for (int position = 0; position < kPositions; ++position) {
        int8_t* const digits = to + position * b_stride(plan);
        for (int half = 0; half < 2; ++half) {
          const Scale scale(largest[position][half].bits);
          store(reinterpret_cast<float*>(digits + b_digits(plan)) + half * kLanes, scale.unit);
          for (int64_t line = 0; line < channels / 4; ++line) {
            const int64_t c = line / 16 * kDepth + line % 16;
            Float u[4];
            for (int i = 0; i < 4; ++i) {
              u[i] = load(scratch + (position * channels + c + 16 * i) * kPanel + half * kLanes);
            }
            const int64_t tile = half * depth(plan) + line / 16;
            store_digits(u, scale.to, digits + tile * kDigits * kTile + line % 16 * 64, kTile);
          }
        }
      }
    }
  }

  static void transform(
      const Conv3x3Plan& plan, const Conv3x3Input& from, int64_t block, int64_t first, int64_t last,
      float* transformed, float* scratch) {
    if (is_narrow(plan)) return Base::transform(plan, from, block, first, last, transformed, scratch);
    const int64_t channels = depth(plan) * kDepth;
    for (int64_t c = plan.in_channels / kLanes * kLanes; c < channels; c += kLanes) {
      for (int position = 0; position < kPositions; ++position)
        store(scratch + position * channels + c, Float{});
    }
    const int64_t tiles = tiles_in(plan, block), end = last < tiles ? last : tiles;
    Base::with_pixels(plan, from, scratch + plan.scratch, [&](auto& pixels) {
      for (int64_t tile = first; tile < end; ++tile) {
        transform(plan, pixels, block * plan.block + tile, tile, transformed, scratch);
      }
    });
  }

  // A tile, the block's `row`-th.
  template <typename Pixels>
  static inline void transform(
      const Conv3x3Plan& plan, Pixels& pixels, int64_t tile, int64_t row, float* transformed,
      float* scratch) {
    const int64_t channels = depth(plan) * kDepth;
    Magnitude largest[ceil_div(kPositions, 16)][16];
    Base::each_input(plan, pixels, tile, [&](int position, int64_t c, Float v) {
      largest[position / 16][position % 16].see(v);
      store(scratch + position * channels + c, v);
    });
    for (int position = 0; position < kPositions; position += 16) {
      const Scale scale(largest_of(largest[position / 16]));
      for (int k = 0; k < 16 && position + k < kPositions; ++k) {
        auto* const to = reinterpret_cast<int8_t*>(transformed) + (position + k) * a_stride(plan);
        reinterpret_cast<float*>(to + a_digits(plan))[row] = scale.unit[k];
        int8_t* digits = to + row / 16 * depth(plan) * kDigits * kTile + row % 16 * 64;
        const float* from = scratch + (position + k) * channels;
        for (int64_t c = 0; c < channels; c += kDepth, digits += kDigits * kTile) {
          const Float v[4] = {load(from + c), load(from + c + 16), load(from + c + 32), load(from + c + 48)};
          store_digits(v, broadcast(scale.to[k]), digits, kTile);
        }
      }
    }
  }

  // Where some panels' products go.
  struct Into {
    float* m;
    int64_t panel, position, row;  // strides
    const float *bias, *plus;      // null where they are added later
  };

  // Of `panels` of them together: a position's tiles are read from the second cache, or from beyond it, once.
  static inline void multiply(
      const Conv3x3Plan& plan, const float* transformed, const float* weights, int64_t panels, int64_t tiles,
      const Into& into) {
    const int64_t pieces = ceil_div(tiles, 32), rows_stride = depth(plan) * kDigits * kTile;
    const bool in_order = tiles <= 16 && depth(plan) <= kMostDepth;  // each weight is read once
    const int64_t panel_bytes = plan.panel_size * sizeof(float);
    const auto* a = reinterpret_cast<const int8_t*>(transformed);
    const auto* b_first = reinterpret_cast<const int8_t*>(weights);
    DigitProducts products_of;
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j, a += a_stride(plan), b_first += b_stride(plan)) {
        const auto slot = Base::slot_of(i, j);
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int8_t* const b = b_first + panel * panel_bytes;
          const int8_t* ahead = in_order             ? b + kAhead
                                : panel + 1 < panels ? b + panel_bytes
                                                     : b_first + b_stride(plan);
          for (int64_t k = 0; k < depth(plan); k += kMostDepth) {
            const int64_t deep = depth(plan) - k < kMostDepth ? depth(plan) - k : kMostDepth;
            const bool first = !slot.adds && k == 0;
            for (int64_t row = 0; row < tiles; row += 32) {
              const int64_t to = panel * into.panel + row * into.row;
              float* const m = into.m + slot.at * into.position + to;
              products_of.multiply({
                  a + row / 16 * rows_stride + k * kDigits * kTile,
                  rows_stride,
                  reinterpret_cast<const float*>(a + a_digits(plan)) + row,
                  b + k * kDigits * kTile,
                  rows_stride,
                  reinterpret_cast<const float*>(b + b_digits(plan)),
                  deep,
                  ahead,
                  2 * kDigits * kTile / pieces,
                  m,
                  into.row,
                  tiles - row < 32 ? tiles - row : 32,
                  first && into.bias != nullptr ? into.bias + panel * kPanel : kNoOffset,
                  !first                 ? m
                  : into.plus == nullptr ? nullptr
                                         : into.plus + to,
              });
              ahead += 2 * deep * kDigits * kTile / pieces;
            }
          }
        }
      }
    }
    products_of.finish();
  }

  static void run(
      const Conv3x3Plan& plan, const float* transformed, const float* packed, const float* bias,
      const void* plus, void* y, int64_t block, int64_t first, int64_t last, float* products) {
    if (is_narrow(plan)) {
      return Base::run(plan, transformed, packed, bias, plus, y, block, first, last, products);
    }
    const Tiles configured;
    const int64_t tiles = tiles_in(plan, block), whole = plan.out_channels / kPanel;
    const int64_t together = tiles > 16 ? kTogether : 1;
    for (int64_t panel = first, panels; panel < last; panel += panels) {
      const bool direct = kTaps == 1 && panel < whole;  // the products are the outputs
      panels = (direct && whole < last ? whole : last) - panel;
      if (panels > together) panels = together;
      const float* const weights = packed + panel * plan.panel_size;
      const auto* const added = static_cast<const float*>(plus);
      auto* const into = static_cast<float*>(y);
      if (direct) {
        const int64_t k = panel * kPanel, to = block * plan.block * plan.out_channels + k;
        multiply(
            plan, transformed, weights, panels, tiles,
            {into + to, kPanel, 0, plan.out_channels, bias == nullptr ? nullptr : bias + k,
             added == nullptr ? nullptr : added + to});
      } else {
        const int64_t size = plan.products / kTogether;
        multiply(
            plan, transformed, weights, panels, tiles,
            {products, size, products_stride(plan), kPanel, nullptr, nullptr});
        for (int64_t i = 0; i < panels; ++i) {
          Base::write(plan, products + i * size, bias, added, into, block, panel + i);
        }
      }
    }
  }

  static constexpr Conv3x3Kernels kKernels = {kTaps, kDown,       kAcross,   kResize, plan,
                                              pack,  Base::begin, transform, run};
};

}  // namespace
}  // namespace ddpm_fast::cpu
