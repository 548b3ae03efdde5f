// conv3x3.h's convolution of bfloat16 by Winograd on AMX. Tiles of outputs and their transforms are the same,
// in float32 registers; transformed inputs and weights are rounded to bfloat16, their products summed in
// float32.
//
// Both lie in the order in which they are loaded: inputs as [position][32 rows][32 channels][16 rows],
// weights as [panel][position][32 channels][half].
#pragma once

#include "amx_bfloat16.h"
#include "conv3x3.h"

namespace ddpm_fast::cpu {
namespace {

template <int kDown, int kAcross>
struct Conv3x3AmxWinograd : Conv3x3<kDown, kAcross, 3, BFloat16> {
  using Base = Conv3x3<kDown, kAcross, 3, BFloat16>;
  using Base::kColumns, Base::kRows;
  using typename Base::Across, typename Base::Down, typename Base::Tile;
  static constexpr int kPositions = kRows * kColumns;
  static constexpr int64_t kMost = 64;  // tiles of outputs in a block

  // Few channels are left to vectors: most of a tile would be empty.
  static bool is_narrow(const Conv3x3Shape& shape) { return shape.in_channels < kWidth; }

  static int64_t depth(const Conv3x3Plan& plan) { return ceil_div(plan.in_channels, kWidth); }

  // In bytes, of a position; with a line: powers of two would share a few sets of the cache.
  static int64_t b_stride(const Conv3x3Plan& plan) { return depth(plan) * kTwoTiles; }
  static int64_t a_stride(const Conv3x3Plan& plan) { return plan.block / 32 * b_stride(plan) + 64; }

  static Conv3x3Plan plan(const Conv3x3Shape& shape, int64_t threads) {
    if (is_narrow(shape)) return Base::plan(shape, threads);
    Conv3x3Plan plan = Base::cut(shape, threads, kMost);
    plan.block = ceil_div(plan.block, 32) * 32;
    plan.products = kPositions * products_stride(plan);
    plan.panel_size = kPositions * b_stride(plan) / sizeof(float);
    plan.packed = plan.panels * plan.panel_size;
    plan.transformed = kPositions * a_stride(plan) / sizeof(float);
    plan.scratch = kPositions * depth(plan) * kWidth;
    return plan;
  }

  static void pack(
      const Conv3x3Plan& plan, const Conv3x3Weight<const float>& weight, int64_t first, int64_t last,
      float* packed, float* scratch) {
    if (is_narrow(plan)) return Base::pack(plan, weight, first, last, packed, scratch);
    pack_bfloat16<Base>(plan, weight, first, last, packed, scratch, [&](int position, int64_t c) {
      return position * depth(plan) + c;
    });
  }

  static void transform(
      const Conv3x3Plan& plan, const void* x, int64_t block, int64_t first, int64_t last, float* transformed,
      float* scratch) {
    if (is_narrow(plan)) return Base::transform(plan, x, block, first, last, transformed, scratch);
    const int64_t tiles = tiles_in(plan, block), stride = a_stride(plan);
    const int64_t filled = ceil_div(plan.in_channels, kLanes) * kLanes;
    for (int64_t tile = first; tile < last && tile < tiles; ++tile) {
      char* const rows = reinterpret_cast<char*>(transformed) + tile / 32 * b_stride(plan) + tile % 32 * 64;
      const auto put = [&](int position, int64_t c, Float v) {
        const __m256bh rounded = _mm512_cvtneps_pbh(v);
        std::memcpy(rows + position * stride + c / kWidth * kTwoTiles + c % kWidth * 2, &rounded, 32);
      };
      Base::each_input(plan, static_cast<const BFloat16*>(x), block * plan.block + tile, put);
      if (filled < depth(plan) * kWidth) {
        for (int position = 0; position < kPositions; ++position) put(position, filled, Float{});
      }
    }
  }

  // 32 rows' products with a panel, or 16 rows'.
  template <int kRowTiles>
  static inline void multiply_rows(int64_t depth, const char* a, const char* b, float* m) {
    zero_sums();
    for (; depth > 0; --depth, a += kTwoTiles, b += kTwoTiles) {
      add_products<kRowTiles>(a, b);
    }
    store_sums<kRowTiles>(m);
  }

  static inline void multiply(
      const Conv3x3Plan& plan, const float* transformed, const float* weights, int64_t tiles,
      float* products) {
    const auto* a = reinterpret_cast<const char*>(transformed);
    const auto* b = reinterpret_cast<const char*>(weights);
    for (int position = 0; position < kPositions; ++position) {
      for (int64_t row = 0; row < tiles; row += 32) {
        const char* const rows = a + row / 32 * b_stride(plan);
        float* const m = products + row * kPanel;
        tiles - row > 16 ? multiply_rows<2>(depth(plan), rows, b, m)
                         : multiply_rows<1>(depth(plan), rows, b, m);
      }
      a += a_stride(plan), b += b_stride(plan), products += products_stride(plan);
    }
  }

  static inline void write(
      const Conv3x3Plan& plan, const float* products, const PanelOutput& to, int64_t block) {
    const int64_t tiles = tiles_in(plan, block), stride = products_stride(plan);
    for (int64_t tile = 0; tile < tiles; ++tile, products += kPanel) {
      const Tile at = Base::tile_at(plan, block * plan.block + tile);
      const int64_t rows = plan.height - at.row < kDown ? plan.height - at.row : kDown;
      const int64_t columns = plan.width - at.column < kAcross ? plan.width - at.column : kAcross;
      Float out[2][kDown][kAcross];
      for (int half = 0; half < 2; ++half) {
        Float down[kDown][kColumns];
        for (int j = 0; j < kColumns; ++j) {
          Float from[kRows], column[kDown];
          for (int i = 0; i < kRows; ++i) {
            from[i] = load(products + (i * kColumns + j) * stride + half * kLanes);
          }
          Down::output(from, column);
          for (int i = 0; i < kDown; ++i) down[i][j] = column[i];
        }
        for (int i = 0; i < kDown; ++i) Across::output(down[i], out[half][i]);
      }
      int64_t pixel = (at.image * plan.height + at.row) * plan.width + at.column;
      for (int i = 0; i < rows; ++i, pixel += plan.width) {
        for (int j = 0; j < columns; ++j) to.write(pixel + j, out[0][i][j], out[1][i][j]);
      }
    }
  }

  static void run(
      const Conv3x3Plan& plan, const float* transformed, const float* packed, const float* bias,
      const void* plus, void* y, int64_t block, int64_t first, int64_t last, float* products) {
    if (is_narrow(plan)) {
      return Base::run(plan, transformed, packed, bias, plus, y, block, first, last, products);
    }
    const Tiles configured;
    const int64_t tiles = tiles_in(plan, block);
    for (int64_t panel = first; panel < last; ++panel) {
      multiply(plan, transformed, packed + panel * plan.panel_size, tiles, products);
      write(plan, products, PanelOutput(plan, panel, bias, plus, y), block);
    }
  }

  static constexpr Conv3x3Kernels kKernels = {3, kDown, kAcross, plan, pack, transform, run};
};

}  // namespace
}  // namespace ddpm_fast::cpu
