// conv3x3.h's convolution with its products on AMX, of numbers as digits: see amx_digits.h. Tiles, their
// transforms and what becomes of the products are the same. A tile's channels at each position are a row with
// a unit of its own, an output channel's weights at each position a column with one.
#pragma once

#include "amx_gemm.h"
#include "conv3x3.h"

namespace ddpm_fast::cpu {
namespace {

template <int kDown, int kAcross, int kTaps = 3>
struct Conv3x3Amx : Conv3x3<kDown, kAcross, kTaps> {
  using Base = Conv3x3<kDown, kAcross, kTaps>;
  using Base::kColumns, Base::kRows;
  static constexpr int kPositions = kRows * kColumns;
  static constexpr int64_t kMost = kTaps == 1 ? 256 : 64;  // tiles of a block

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
      std::memset(scratch, 0, kPositions * channels * kPanel * sizeof(float));
      Base::each_weight(plan, weight, panel, [&](int position, int64_t c, int half, Float u) {
        largest[position][half].see(u);
        store(scratch + (position * channels + c) * kPanel + half * kLanes, u);
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

  static inline void multiply(
      const Conv3x3Plan& plan, const float* transformed, const float* weights, int64_t tiles,
      float* products) {
    const int64_t pairs = ceil_div(tiles, 32), m_stride = products_stride(plan);
    const int64_t rows_stride = depth(plan) * kDigits * kTile;
    const auto* a = reinterpret_cast<const int8_t*>(transformed);
    const auto* b = reinterpret_cast<const int8_t*>(weights);
    DigitProducts products_of;
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j, a += a_stride(plan), b += b_stride(plan)) {
        const auto slot = Base::slot_of(i, j);
        const int8_t* ahead = b + b_stride(plan);
        for (int64_t k = 0; k < depth(plan); k += kMostDepth) {
          const int64_t deep = depth(plan) - k < kMostDepth ? depth(plan) - k : kMostDepth;
          for (int64_t row = 0; row < tiles; row += 32) {
            for (int half = 0; half < 2; ++half) {
              products_of.multiply({
                  a + row / 16 * rows_stride + k * kDigits * kTile,
                  rows_stride,
                  reinterpret_cast<const float*>(a + a_digits(plan)) + row,
                  b + (half * depth(plan) + k) * kDigits * kTile,
                  reinterpret_cast<const float*>(b + b_digits(plan)) + half * kLanes,
                  deep,
                  ahead,
                  kDigits * kTile / pairs,
                  products + slot.at * m_stride + row * kPanel + half * kLanes,
                  tiles - row < 32 ? tiles - row : 32,
                  slot.adds || k > 0,
              });
              ahead += deep * kDigits * kTile / pairs;
            }
          }
        }
      }
    }
    products_of.finish();
  }

  static void run(
      const Conv3x3Plan& plan, const float* transformed, const float* packed, const float* bias,
      const float* plus, float* y, int64_t block, int64_t first, int64_t last, float* products) {
    if (is_narrow(plan)) {
      return Base::run(plan, transformed, packed, bias, plus, y, block, first, last, products);
    }
    const Tiles configured;
    const int64_t tiles = tiles_in(plan, block);
    for (int64_t panel = first; panel < last; ++panel) {
      multiply(plan, transformed, packed + panel * plan.panel_size, tiles, products);
      Base::write(plan, products, bias, plus, y, block, panel);
    }
  }

  static constexpr Conv3x3Kernels kKernels = {kTaps, kDown, kAcross, plan, pack, Base::begin, transform, run};
};

}  // namespace
}  // namespace ddpm_fast::cpu
