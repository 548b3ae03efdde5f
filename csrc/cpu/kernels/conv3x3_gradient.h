// The gradients to the weight and the bias of a 3x3 convolution, stride 1, padded by 1, channels last, from
// those to its outputs: Winograd's F(4x4, 3x3) turned about. With the forward's matrices (conv3x3_winograd.h)
//
//   Y = A' [(G g H') * (B' d C)] D   has   dg = G' [sum over tiles of (A dY D') * (B' d C)] H
//
// A block's tiles are transformed, inputs as forward, gradients to [panel][position][tile][kPanel]; each
// position's products of the two are summed over the block's tiles in registers, and over blocks in memory,
// [panel][position][channels][kPanel]. After the last block the sums go through G' and H. A gradient's panel
// has one position more, the sum of each tile's pixels, which makes the bias.
#pragma once

#include "conv3x3.h"

namespace ddpm_fast::cpu {
namespace {

struct Conv3x3Gradient {
  using Tile = Winograd<4, 3>;
  using Forward = Conv3x3<4, 4>;
  static constexpr int kSize = Tile::kSize, kPositions = kSize * kSize;
  static constexpr int kRows = kLanes / 2;  // times two registers of sums: half of all there are

  static constexpr int64_t kFloats = 5 << 16;  // of a block's tiles, transformed: stay in the second cache
  static constexpr int64_t kLeast = 64;        // tiles: sums are read and written once a block

  static int64_t sums_stride(const Conv3x3Plan& plan) {
    return ceil_div(plan.in_channels, kLanes) * kLanes * kPanel;
  }
  static int64_t panel_stride(const Conv3x3Plan& plan) { return (kPositions + 1) * products_stride(plan); }
  static int64_t panel_sums(const Conv3x3Plan& plan) { return kPositions * sums_stride(plan) + kPanel; }

  // Conv3x3's with blocks of another size; `products` is the gradients', `packed` the sums' size.
  static Conv3x3Plan plan(const Conv3x3Shape& shape) {
    Conv3x3Plan plan = Forward::plan(shape, 1);
    const int64_t fit = kFloats / (kPositions * (shape.in_channels + kPanel));
    plan.blocks = ceil_div(plan.tiles, fit < kLeast ? kLeast : fit);
    plan.block = ceil_div(plan.tiles, plan.blocks);
    plan.transformed = kPositions * transformed_stride(plan);
    plan.products = plan.panels * panel_stride(plan);
    plan.packed = plan.panels * panel_sums(plan);
    return plan;
  }

  static void transform(
      const Conv3x3Plan& plan, const float* x, const float* grad, int64_t block, int64_t first, int64_t last,
      float* inputs, float* outputs) {
    Forward::transform(plan, {x}, block, first, last, inputs, nullptr);
    const int64_t tiles = tiles_in(plan, block), channels = plan.out_channels;
    const int64_t stride = products_stride(plan);
    for (int64_t tile = first; tile < last && tile < tiles; ++tile) {
      const auto at = Forward::tile_at(plan, block * plan.block + tile);
      for (int64_t k = 0; k < channels; k += kLanes) {
        const auto pixel = [&](int64_t i, int64_t j) {
          if (at.row + i >= plan.height || at.column + j >= plan.width) return Float{};
          const int64_t where = (at.image * plan.height + at.row + i) * plan.width + at.column + j;
          const float* const from = grad + where * channels + k;
          return k + kLanes <= channels ? load(from) : load(from, channels - k);
        };
        Float down[4][kSize], e[kSize], all = {};
        for (int j = 0; j < 4; ++j) {
          const Float y[4] = {pixel(0, j), pixel(1, j), pixel(2, j), pixel(3, j)};
          all += (y[0] + y[1]) + (y[2] + y[3]);
          Tile::output_transposed(y, down[j]);
        }
        float* const to = outputs + k / kPanel * panel_stride(plan) + tile * kPanel + k % kPanel;
        for (int i = 0; i < kSize; ++i) {
          const Float y[4] = {down[0][i], down[1][i], down[2][i], down[3][i]};
          Tile::output_transposed(y, e);
          for (int j = 0; j < kSize; ++j) store(to + (i * kSize + j) * stride, e[j]);
        }
        store(to + kPositions * stride, all);
      }
    }
  }

  // m[row][kPanel] += sum over tiles of a[tile][row] b[tile][kPanel]; for the first block =.
  static inline void multiply(const float* a, const float* b, int64_t tiles, bool adds, float* m) {
    Float sums[kRows][2] = {};
    for (int64_t tile = 0; tile < tiles; ++tile, a += kLanes, b += kPanel) {
      const Float b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Float value = broadcast(a[r]);
        sums[r][0] += value * b0;
        sums[r][1] += value * b1;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r, m += kPanel) {
      store(m, adds ? sums[r][0] + load(m) : sums[r][0]);
      store(m + kLanes, adds ? sums[r][1] + load(m + kLanes) : sums[r][1]);
    }
  }

  // Tasks [first, last) of panels x (kPositions + 1).
  static void accumulate(
      const Conv3x3Plan& plan, const float* inputs, const float* outputs, int64_t block, int64_t first,
      int64_t last, float* sums) {
    const int64_t tiles = tiles_in(plan, block), channels = plan.in_channels;
    for (int64_t task = first; task < last; ++task) {
      const int64_t panel = task / (kPositions + 1), position = task % (kPositions + 1);
      const float* const b = outputs + panel * panel_stride(plan) + position * products_stride(plan);
      float* const m = sums + panel * panel_sums(plan) + position * sums_stride(plan);
      if (position == kPositions) {
        for (int64_t k = 0; k < kPanel; k += kLanes) {
          Float all = {};
          for (int64_t tile = 0; tile < tiles; ++tile) all += load(b + tile * kPanel + k);
          store(m + k, block == 0 ? all : all + load(m + k));
        }
        continue;
      }
      const float* const a = inputs + position * transformed_stride(plan);
      for (int64_t c = 0; c < channels; c += kRows) {
        const int64_t from = c / kLanes * plan.block * kLanes + c % kLanes;
        multiply(a + from, b, tiles, block != 0, m + c * kPanel);
      }
    }
  }

  static void finish(
      const Conv3x3Plan& plan, const float* sums, int64_t first, int64_t last,
      const Conv3x3Weight<float>& weight, float* bias) {
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t k = panel * kPanel, rest = plan.out_channels - k, width = rest < kPanel ? rest : kPanel;
      const float* const from = sums + panel * panel_sums(plan);
      for (int64_t l = 0; l < width; ++l) bias[k + l] = from[kPositions * sums_stride(plan) + l];
      for (int64_t c = 0; c < plan.in_channels; ++c) {
        float taps[9][kPanel];
        for (int half = 0; half < 2; ++half) {
          const float* const u = from + c * kPanel + half * kLanes;
          Float down[kSize][3], g[3];
          for (int j = 0; j < kSize; ++j) {
            Float column[kSize];
            for (int i = 0; i < kSize; ++i) column[i] = load(u + (i * kSize + j) * sums_stride(plan));
            Tile::weight_transposed(column, down[j]);
          }
          for (int i = 0; i < 3; ++i) {
            const Float row[kSize] = {down[0][i], down[1][i], down[2][i], down[3][i], down[4][i], down[5][i]};
            Tile::weight_transposed(row, g);
            for (int j = 0; j < 3; ++j) store(taps[3 * i + j] + half * kLanes, g[j]);
          }
        }
        for (int64_t l = 0; l < width; ++l) {
          for (int t = 0; t < 9; ++t) *weight.at(k + l, c, t) = taps[t][l];
        }
      }
    }
  }

  static constexpr Conv3x3GradientKernels kKernels = {kPositions + 1, plan, transform, accumulate, finish};
};

}  // namespace
}  // namespace ddpm_fast::cpu
