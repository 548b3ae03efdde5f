// conv3x3.h's convolution of bfloat16 on AMX. Tiles of outputs and their transforms are the same, in float32
// registers; transformed inputs and weights are rounded to bfloat16, their products summed in float32.
//
// A tile of the processor is 16 rows of 64 bytes. One of a is 32 channels of 16 tiles of outputs; one of b
// 32 channels of 16 output channels: by lines, two channels' for each of them. Both lie in the order in which
// they are loaded: a as [position][32 rows][32 channels][16 rows], b as [panel][position][32 channels][half].
#pragma once

#include "amx_gemm.h"
#include "conv3x3.h"

namespace ddpm_fast::cpu {
namespace {

template <int kDown, int kAcross, int kTaps = 3>
struct Conv3x3AmxBFloat16 : Conv3x3<kDown, kAcross, kTaps, BFloat16> {
  using Base = Conv3x3<kDown, kAcross, kTaps, BFloat16>;
  using typename Base::Tile, typename Base::Down, typename Base::Across;
  using Base::kColumns, Base::kRows;
  static constexpr int kPositions = kRows * kColumns;
  static constexpr int kProducts = Down::kProducts * Across::kProducts;
  static constexpr int kSummed = kPositions / kProducts;  // positions of a product
  static constexpr int kChannels = 32;                    // of a tile
  static constexpr int64_t kPair = 2 * kTile;             // bytes of two tiles, which are used together
  static constexpr int64_t kMost = kTaps == 1 ? 256 : 64;  // tiles of outputs in a block

  // Few channels are left to vectors: most of a tile would be empty.
  static bool is_narrow(const Conv3x3Shape& shape) { return shape.in_channels < kChannels; }

  static int64_t depth(const Conv3x3Plan& plan) { return ceil_div(plan.in_channels, kChannels); }

  // In bytes, of a position; with a line: powers of two would share a few sets of the cache.
  static int64_t b_stride(const Conv3x3Plan& plan) { return depth(plan) * kPair; }
  static int64_t a_stride(const Conv3x3Plan& plan) { return plan.block / 32 * depth(plan) * kPair + 64; }

  static Conv3x3Plan plan(const Conv3x3Shape& shape, int64_t threads) {
    if (is_narrow(shape)) return Base::plan(shape, threads);
    Conv3x3Plan plan = Base::cut(shape, threads, kMost);
    plan.block = ceil_div(plan.block, 32) * 32;
    plan.products = kProducts * products_stride(plan);
    plan.panel_size = kPositions * b_stride(plan) / sizeof(float);
    plan.packed = plan.panels * plan.panel_size;
    plan.transformed = kPositions * a_stride(plan) / sizeof(float);
    plan.scratch = kPositions * depth(plan) * kChannels;
    return plan;
  }

  static void pack(
      const Conv3x3Plan& plan, const Conv3x3Weight<const float>& weight, int64_t first, int64_t last,
      float* packed, float* scratch) {
    if (is_narrow(plan)) return Base::pack(plan, weight, first, last, packed, scratch);
    const int64_t channels = depth(plan) * kChannels;
    for (int64_t panel = first; panel < last; ++panel) {
      std::memset(scratch, 0, kPositions * channels * kPanel * sizeof(float));
      Base::each_weight(plan, weight, panel, [&](int position, int64_t c, int half, Float u) {
        store(scratch + (position * channels + c) * kPanel + half * kLanes, u);
      });
      auto* to = reinterpret_cast<BFloat16*>(packed + panel * plan.panel_size);
      for (int64_t c = 0; c < kPositions * channels; c += kChannels) {
        for (int half = 0; half < 2; ++half) {
          for (int line = 0; line < 16; ++line, to += 2 * kLanes) {
            const float* const u = scratch + (c + 2 * line) * kPanel + half * kLanes;
            store_pair(to, {load(u), load(u + kPanel)});
          }
        }
      }
    }
  }

  static void transform(
      const Conv3x3Plan& plan, const void* x, int64_t block, int64_t first, int64_t last, float* transformed,
      float* scratch) {
    if (is_narrow(plan)) return Base::transform(plan, x, block, first, last, transformed, scratch);
    const int64_t tiles = tiles_in(plan, block), stride = a_stride(plan);
    const int64_t filled = ceil_div(plan.in_channels, kLanes) * kLanes;
    for (int64_t tile = first; tile < last && tile < tiles; ++tile) {
      char* const rows = reinterpret_cast<char*>(transformed) + tile / 32 * depth(plan) * kPair +
                         tile % 32 * 64;  // the second 16 rows' tile is next to the first's
      const auto put = [&](int position, int64_t c, Float v) {
        char* const to = rows + position * stride + c / kChannels * kPair + c % kChannels * sizeof(BFloat16);
        store_rounded(to, v);
      };
      Base::each_input(plan, static_cast<const BFloat16*>(x), block * plan.block + tile, put);
      if (filled < depth(plan) * kChannels) {
        for (int position = 0; position < kPositions; ++position) put(position, filled, Float{});
      }
    }
  }

  static inline void store_rounded(void* to, Float from) {
    const __m256bh rounded = _mm512_cvtneps_pbh(from);
    std::memcpy(to, &rounded, sizeof(rounded));
  }

  // 32 rows' products with a panel, or 16 rows'.
  template <int kRowTiles>
  static inline void multiply_rows(const Conv3x3Plan& plan, const char* a, const char* b, float* m) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int64_t skip = a_stride(plan) - b_stride(plan);
    for (int position = 0; position < kSummed; ++position, a += skip) {
      for (int64_t k = depth(plan); k > 0; --k, a += kPair, b += kPair) {
        _tile_loadd(6, b, 64);
        _tile_loadd(4, a, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kRowTiles == 2) {
          _tile_loadd(5, a + kTile, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    constexpr int64_t kRow = kPanel * sizeof(float);
    _tile_stored(0, m, kRow);
    _tile_stored(1, m + kLanes, kRow);
    if constexpr (kRowTiles == 2) {
      _tile_stored(2, m + 16 * kPanel, kRow);
      _tile_stored(3, m + 16 * kPanel + kLanes, kRow);
    }
  }

  static inline void multiply(
      const Conv3x3Plan& plan, const float* transformed, const float* weights, int64_t tiles,
      float* products) {
    const auto* a = reinterpret_cast<const char*>(transformed);
    const auto* b = reinterpret_cast<const char*>(weights);
    for (int product = 0; product < kProducts; ++product) {
      for (int64_t row = 0; row < tiles; row += 32) {
        const char* const rows = a + row / 32 * depth(plan) * kPair;
        tiles - row > 16 ? multiply_rows<2>(plan, rows, b, products + row * kPanel)
                         : multiply_rows<1>(plan, rows, b, products + row * kPanel);
      }
      a += kSummed * a_stride(plan), b += kSummed * b_stride(plan), products += products_stride(plan);
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
      Base::write(
          plan, products, bias, static_cast<const BFloat16*>(plus), static_cast<BFloat16*>(y), block, panel);
    }
  }

  static constexpr Conv3x3Kernels kKernels = {kTaps, kDown, kAcross, plan, pack, transform, run};
};

}  // namespace
}  // namespace ddpm_fast::cpu
