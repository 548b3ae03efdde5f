// y = conv3x3(x, w) + bias + plus, padded by 1, channels last, in tiles of outputs: Winograd's F(4x4, 3x3),
// F(4x2), F(2x2), or direct, which is F(1x1); of x twice as large F(2x2), with stride 2 that or direct.
//
// Tiles are taken in blocks. A block's tiles are transformed, into [position][channels][tile][kLanes] with
// kLanes channels together; each position's tiles are multiplied by its weights, kPanel output channels at a
// time; a panel's products go back through the inverse transform while they are in cache, with bias and plus.
// Weights are packed once, as [panel][position][channel][kPanel]: they are read once a block, in order.
#pragma once

#include "../kernels.h"
#include "conv3x3_gemm.h"
#include "conv3x3_pixels.h"
#include "conv3x3_winograd.h"

namespace ddpm_fast::cpu {
namespace {

// Tiles of a block at most: the more, the less often weights are read; but what they are transformed into has
// to stay in the second cache.
constexpr int64_t kBlock = 48;

// Where a block's positions lie. A line is added to each: powers of two would share a few sets of the cache.
inline int64_t transformed_stride(const Conv3x3Plan& plan) {
  return ceil_div(plan.in_channels, kLanes) * plan.block * kLanes + 16;
}
inline int64_t products_stride(const Conv3x3Plan& plan) { return plan.block * kPanel + 16; }

inline int64_t tiles_in(const Conv3x3Plan& plan, int64_t block) {
  const int64_t rest = plan.tiles - block * plan.block;
  return rest < 0 ? 0 : rest < plan.block ? rest : plan.block;
}

// The convolution in tiles of kDown x kAcross outputs; with one tap it is a linear layer on the pixels.
// T: what x, plus and y are of; everything between is float32.
template <int kDown, int kAcross, int kTaps = 3, Resize kResize = Resize::kNone, typename T = float>
struct Conv3x3 {
  using Down = Winograd<kDown, kTaps, kResize>;
  using Across = Winograd<kAcross, kTaps, kResize>;
  static constexpr int kRows = Down::kSize, kColumns = Across::kSize;  // of inputs
  // From a tile's inputs to the next one's.
  static constexpr int kStep = kResize == Resize::kUp     ? kAcross / 2
                               : kResize == Resize::kDown ? 2 * kAcross
                                                          : kAcross;
  using Prepared = PreparedPixels<T, kRows, kColumns, kStep>;

  // With at most `most` tiles in a block.
  static Conv3x3Plan cut(const Conv3x3Shape& shape, int64_t threads, int64_t most) {
    Conv3x3Plan plan = {};
    static_cast<Conv3x3Shape&>(plan) = shape;
    plan.out_height = plan.resized(kResize, plan.height);
    plan.out_width = plan.resized(kResize, plan.width);
    plan.tiles = plan.batch * ceil_div(plan.out_height, kDown) * ceil_div(plan.out_width, kAcross);
    plan.blocks = ceil_div(plan.tiles, most);
    if (plan.blocks > threads) plan.blocks = ceil_div(plan.blocks, threads) * threads;
    plan.block = ceil_div(plan.tiles, plan.blocks);  // all alike
    plan.panels = ceil_div(plan.out_channels, kPanel);
    plan.products = Down::kProducts * Across::kProducts * products_stride(plan);
    plan.pixels = Prepared::size(plan);
    return plan;
  }

  static Conv3x3Plan plan(const Conv3x3Shape& shape, int64_t threads) {
    Conv3x3Plan plan = cut(shape, threads, kBlock);
    plan.panel_size = kRows * kColumns * plan.in_channels * kPanel;
    plan.packed = kRows * kColumns * plan.in_channels * ceil_div(plan.out_channels, 32) * 32;
    plan.transformed = kRows * kColumns * transformed_stride(plan);
    return plan;
  }

  // ---- weights ----

  // Calls put(position, channel, half, u) with a panel's transformed weights.
  template <typename Put>
  static inline void each_weight(
      const Conv3x3Plan& plan, const Conv3x3Weight<const float>& weight, int64_t panel, const Put& put) {
    const int64_t channels = plan.in_channels, k = panel * kPanel;
    const int64_t width = plan.out_channels - k < kPanel ? plan.out_channels - k : kPanel;
    for (int64_t c = 0; c < channels; ++c) {
      float taps[kTaps * kTaps][kPanel] = {};
      for (int64_t l = 0; l < width; ++l) {
        for (int t = 0; t < kTaps * kTaps; ++t) taps[t][l] = *weight.at(k + l, c, t);
      }
      for (int half = 0; half < 2; ++half) {
        const auto tap = [&](int t) { return load(taps[t] + half * kLanes); };
        Float g[kTaps], down[kTaps][kRows], u[kColumns];
        for (int j = 0; j < kTaps; ++j) {
          for (int t = 0; t < kTaps; ++t) g[t] = tap(t * kTaps + j);
          Down::weight(g, down[j]);
        }
        for (int i = 0; i < kRows; ++i) {
          for (int t = 0; t < kTaps; ++t) g[t] = down[t][i];
          Across::weight(g, u);
          for (int j = 0; j < kColumns; ++j) put(i * kColumns + j, c, half, u[j]);
        }
      }
    }
  }

  // A panel's transformed weights as [position][channel][kPanel], with zeros after the last of `channels`;
  // see(position, half, u) besides.
  template <typename See>
  static inline void lay_out_weights(
      const Conv3x3Plan& plan, const Conv3x3Weight<const float>& weight, int64_t panel, int64_t channels,
      float* to, const See& see) {
    std::memset(to, 0, kRows * kColumns * channels * kPanel * sizeof(float));
    each_weight(plan, weight, panel, [&](int position, int64_t c, int half, Float u) {
      see(position, half, u);
      store(to + (position * channels + c) * kPanel + half * kLanes, u);
    });
  }

  static void pack(
      const Conv3x3Plan& plan, const Conv3x3Weight<const float>& weight, int64_t first, int64_t last,
      float* packed, float*) {
    for (int64_t panel = first; panel < last; ++panel) {
      float* const to = packed + panel * plan.panel_size;
      each_weight(plan, weight, panel, [&](int position, int64_t c, int half, Float u) {
        store(to + (position * plan.in_channels + c) * kPanel + half * kLanes, u);
      });
    }
  }

  // ---- inputs ----

  struct Tile {
    int64_t image, row, column;  // of its first output
  };

  static inline Tile tile_at(const Conv3x3Plan& plan, int64_t tile) {
    const int64_t across = ceil_div(plan.out_width, kAcross), down = ceil_div(plan.out_height, kDown);
    return {tile / (across * down), tile / across % down * kDown, tile % across * kAcross};
  }

  static inline void advance(const Conv3x3Plan& plan, Tile& at) {  // divisions take as long as a small tile
    at.column += kAcross;
    if (at.column < plan.out_width) return;
    at.column = 0;
    at.row += kDown;
    if (at.row < plan.out_height) return;
    at.row = 0;
    ++at.image;
  }

  // Of the inputs of outputs from `out` on.
  static inline int64_t first_input(const Conv3x3Plan& plan, int64_t out) {
    const int64_t at = kResize == Resize::kNone ? out : kResize == Resize::kUp ? out / 2 : 2 * out;
    return at - kTaps / 2 + plan.shift;
  }

  // Calls put(position, channel, v) with a tile's transformed inputs, of kLanes channels at once.
  template <typename Pixels, typename Put>
  static inline void each_input(const Conv3x3Plan& plan, Pixels& from, int64_t tile, const Put& put) {
    const int64_t channels = plan.in_channels;
    const Tile at = tile_at(plan, tile);
    const int64_t first_row = first_input(plan, at.row), first_column = first_input(plan, at.column);
    const typename Pixels::Value* pixels[kRows][kColumns];  // null where they are padding
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        const int64_t row = first_row + i, column = first_column + j;
        const bool inside = row >= 0 && row < plan.height && column >= 0 && column < plan.width;
        pixels[i][j] = inside ? from.at(at.image, row, column) : nullptr;
      }
    }
    for (int64_t c = 0; c < channels; c += kLanes) {
      const auto pixel = [&](int i, int j) {
        if (pixels[i][j] == nullptr) return Float{};
        return c + kLanes <= channels ? load(pixels[i][j] + c) : load(pixels[i][j] + c, channels - c);
      };
      Float down[kRows][kColumns], v[kColumns];
      for (int j = 0; j < kColumns; ++j) {
        Float d[kRows], column[kRows];
        for (int i = 0; i < kRows; ++i) d[i] = pixel(i, j);
        Down::input(d, column);
        for (int i = 0; i < kRows; ++i) down[i][j] = column[i];
      }
      for (int i = 0; i < kRows; ++i) {
        Across::input(down[i], v);
        for (int j = 0; j < kColumns; ++j) put(i * kColumns + j, c, v[j]);
      }
    }
  }

  // run(pixels); `memory` is for those that are prepared.
  template <typename Run>
  static inline void with_pixels(
      const Conv3x3Plan& plan, const Conv3x3Input& from, float* memory, const Run& run) {
    if (from.is_plain()) {
      PlainPixels<T> pixels = {plan, static_cast<const T*>(from.x)};
      run(pixels);
    } else {
      Prepared pixels(plan, from, memory);
      run(pixels);
    }
  }

  static void begin(const Conv3x3Plan& plan, const Conv3x3Input& from, float* scratch) {
    if (!from.is_plain()) Prepared(plan, from, scratch + plan.scratch).clear();
  }

  static void transform(
      const Conv3x3Plan& plan, const Conv3x3Input& from, int64_t block, int64_t first, int64_t last,
      float* transformed, float* scratch) {
    const int64_t stride = transformed_stride(plan), tiles = tiles_in(plan, block);
    with_pixels(plan, from, scratch + plan.scratch, [&](auto& pixels) {
      for (int64_t tile = first; tile < last && tile < tiles; ++tile) {
        each_input(plan, pixels, block * plan.block + tile, [&](int position, int64_t c, Float v) {
          store(transformed + position * stride + c * plan.block + tile * kLanes, v);
        });
      }
    });
  }

  // ---- products ----

  // Where a position's products go, and whether to others that are there: of fewer products than positions,
  // as many as there can be are sums of two neighbours; F(1, 3)'s only one is of all.
  struct Slot {
    int at;
    bool adds;
  };

  template <typename Dimension>
  static constexpr Slot slot_in(int k) {
    const auto at = [](int position) { return position * Dimension::kProducts / Dimension::kSize; };
    return {at(k), k > 0 && at(k - 1) == at(k)};
  }

  static constexpr Slot slot_of(int i, int j) {
    const Slot row = slot_in<Down>(i), column = slot_in<Across>(j);
    return {row.at * Across::kProducts + column.at, row.adds || column.adds};
  }

  // A panel's products at every position.
  static inline void multiply(
      const Conv3x3Plan& plan, const float* transformed, const float* weights, int64_t tiles,
      float* products) {
    const int64_t channels = plan.in_channels, pieces = ceil_div(tiles, kMaxRows);
    const int64_t a_stride = transformed_stride(plan), m_stride = products_stride(plan);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        const int position = i * kColumns + j;
        const Slot slot = slot_of(i, j);
        const float* const b = weights + position * channels * kPanel;
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const int64_t row = piece * tiles / pieces, rows = (piece + 1) * tiles / pieces - row;
          const Product product = {
              transformed + position * a_stride + row * kLanes,
              plan.block * kLanes,
              b,
              channels,
              b + channels * kPanel + channels * kPanel * piece / pieces,
              kPanel / pieces,
              products + slot.at * m_stride + row * kPanel,
          };
          cpu::multiply(rows, slot.adds, product);
        }
      }
    }
  }

  // ---- outputs ----

  static inline void write(
      const Conv3x3Plan& plan, const float* products, const float* bias, const T* plus, T* y, int64_t block,
      int64_t panel) {
    const int64_t tiles = tiles_in(plan, block);
    const int64_t stride = products_stride(plan), channels = plan.out_channels;
    Tile at = tile_at(plan, block * plan.block);
    for (int64_t tile = 0; tile < tiles; ++tile, advance(plan, at)) {
      const int64_t rows = plan.out_height - at.row < kDown ? plan.out_height - at.row : kDown;
      const int64_t columns = plan.out_width - at.column < kAcross ? plan.out_width - at.column : kAcross;
      for (int half = 0; half < 2; ++half) {
        const int64_t k = panel * kPanel + half * kLanes, lanes = channels - k;
        if (lanes <= 0) break;
        const float* const m = products + tile * kPanel + half * kLanes;
        Float down[kDown][Across::kProducts], out[kDown][kAcross];
        for (int j = 0; j < Across::kProducts; ++j) {
          Float from[Down::kProducts], column[kDown];
          for (int i = 0; i < Down::kProducts; ++i) from[i] = load(m + (i * Across::kProducts + j) * stride);
          Down::output(from, column);
          for (int i = 0; i < kDown; ++i) down[i][j] = column[i];
        }
        for (int i = 0; i < kDown; ++i) Across::output(down[i], out[i]);
        const bool whole = lanes >= kLanes;
        const Float add = bias == nullptr ? Float{} : whole ? load(bias + k) : load(bias + k, lanes);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t pixel = (at.image * plan.out_height + at.row + i) * plan.out_width + at.column;
          for (int64_t j = 0; j < columns; ++j) {
            const int64_t to = (pixel + j) * channels + k;
            Float value = out[i][j] + add;
            if (whole) {
              if (plus != nullptr) value += load(plus + to);
              store(y + to, value);
            } else {
              if (plus != nullptr) value += load(plus + to, lanes);
              store(y + to, value, lanes);
            }
          }
        }
      }
    }
  }

  static void run(
      const Conv3x3Plan& plan, const float* transformed, const float* packed, const float* bias,
      const void* plus, void* y, int64_t block, int64_t first, int64_t last, float* products) {
    const int64_t tiles = tiles_in(plan, block);
    for (int64_t panel = first; panel < last; ++panel) {
      multiply(plan, transformed, packed + panel * plan.panel_size, tiles, products);
      write(plan, products, bias, static_cast<const T*>(plus), static_cast<T*>(y), block, panel);
    }
  }

  static constexpr Conv3x3Kernels kKernels = {kTaps, kDown, kAcross,   kResize, plan,
                                              pack,  begin, transform, run};
};

}  // namespace
}  // namespace ddpm_fast::cpu
