// Attention's two products on AMX: of float32 as int8 digits, see amx_digits.h, and of bfloat16.
#pragma once

#include "amx_gemm.h"
#include "attention_products.h"

namespace ddpm_fast::cpu {
namespace {

// Rows are queries or their weights, columns keys or channels of values. Both have depth / kDepth tiles
// beside each other for 16 of them, and their units after the last. A weight is at most 1, which is its row's
// unit.
struct DigitsProducts {
  using Element = float;
  static constexpr int64_t kBlock = 32;

  static int64_t tiles(int64_t depth) { return ceil_div(depth, kDepth); }
  static int64_t units_at(int64_t depth) { return 2 * tiles(depth) * kDigits * kTile / sizeof(float); }
  static int64_t rows_size(int64_t depth) { return units_at(depth) + 32; }
  static int64_t columns_size(int64_t depth) { return units_at(depth) + kPanel; }
  static int64_t scratch_size(int64_t depth) { return tiles(depth) * kDepth * kPanel; }

  // [depth][kPanel], which is at `from`.
  static void lay_out(const float* from, int64_t depth, float* to) {
    for (int half = 0; half < 2; ++half, from += kLanes) {
      Magnitude largest;
      for (int64_t c = 0; c < depth; ++c) largest.see(load(from + c * kPanel));
      const Scale scale(largest.bits);
      store(to + units_at(depth) + half * kLanes, scale.unit);
      auto* digits = reinterpret_cast<int8_t*>(to) + half * tiles(depth) * kDigits * kTile;
      for (int64_t tile = 0; tile < tiles(depth); ++tile, digits += kDigits * kTile) {
        for (int64_t line = 0; line < 16; ++line) {
          Float v[4];
          for (int i = 0; i < 4; ++i) {
            const int64_t c = tile * kDepth + 16 * i + line;
            v[i] = c < depth ? load(from + c * kPanel) : Float{};
          }
          store_digits(v, scale.to, digits + line * 64, kTile);
        }
      }
    }
  }

  static void lay_out_keys(
      const float* k, int64_t stride, int64_t keys, int64_t width, float* to, float* scratch) {
    transpose_keys(k, stride, keys, width, scratch);
    lay_out(scratch, width, to);
  }

  static void lay_out_values(
      const float* v, int64_t stride, int64_t keys, int64_t channels, float* to, float* scratch) {
    FloatProducts<float>::lay_out_values(v, stride, keys, channels, scratch, nullptr);
    lay_out(scratch, keys, to);
  }

  static int8_t* line_of(float* rows, int64_t depth, int64_t row, int64_t tile) {
    return reinterpret_cast<int8_t*>(rows) + (row / 16 * tiles(depth) + tile) * kDigits * kTile +
           row % 16 * 64;
  }

  void take_queries(const float* q, int64_t stride, int64_t count, int64_t width, float* to) {
    for (int64_t row = 0; row < count; row += 16) {
      const int64_t rows = count - row < 16 ? count - row : 16;
      Magnitude largest[16];
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < width; c += kLanes) {
          largest[i].see(load_first(q + (row + i) * stride + c, width - c));
        }
      }
      const Scale scale(largest_of(largest));
      store(to + units_at(width) + row, scale.unit);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t tile = 0; tile < tiles(width); ++tile) {
          const float* const from = q + (row + i) * stride + tile * kDepth;
          const int64_t rest = width - tile * kDepth;
          const Float v[4] = {
              load_first(from, rest), load_first(from + 16, rest - 16), load_first(from + 32, rest - 32),
              load_first(from + 48, rest - 48)};
          store_digits(v, broadcast(scale.to[i]), line_of(to, width, row + i, tile), kTile);
        }
      }
    }
  }

  void put(float* to, int64_t keys, int64_t row, int64_t group, const Float (&p)[4]) {
    to[units_at(keys) + row] = kUnit;
    store_digits(p, broadcast(kLargest), line_of(to, keys, row, group), kTile);
  }

  void multiply(const float* a, const float* b, int64_t depth, float* m, int64_t count, bool adds) {
    const int64_t of_tile = kDigits * kTile, next = tiles(depth) * of_tile;
    const auto* const rows = reinterpret_cast<const int8_t*>(a);
    const auto* const columns = reinterpret_cast<const int8_t*>(b);
    for (int half = 0; half < 2; ++half) {
      for (int64_t k = 0; k < tiles(depth); k += kMostDepth) {
        const int8_t* const at = columns + half * next + k * of_tile;
        products_.multiply({
            rows + k * of_tile,
            next,
            a + units_at(depth),
            at,
            b + units_at(depth) + half * kLanes,
            tiles(depth) - k < kMostDepth ? tiles(depth) - k : kMostDepth,
            at,
            0,
            m + half * kLanes,
            count,
            adds || k > 0,
        });
      }
    }
  }

  void finish() {
    products_.finish();
    products_ = {};
  }

 private:
  Tiles configured_;
  DigitProducts products_;
};

// Tiles of 32 numbers of 16 rows; columns have pairs of numbers, 16 pairs a line. The two of a pair are
// neighbours among a head's channels; among keys they are 16 apart, as weights come.
struct BFloat16Products {
  using Element = BFloat16;
  static constexpr int64_t kBlock = 32;
  static constexpr int64_t kPairs = 16, kTileFloats = kTile / sizeof(float);

  static int64_t tiles(int64_t depth) { return ceil_div(depth, 2 * kPairs); }
  static int64_t columns_size(int64_t depth) { return 2 * tiles(depth) * kTileFloats; }
  static int64_t rows_size(int64_t depth) { return columns_size(depth); }
  static int64_t scratch_size(int64_t) { return 0; }

  // A line of 32 numbers, of which there are n.
  static Float pairs(const BFloat16* from, int64_t n) {
    Float line = {};
    std::memcpy(&line, from, n < 2 * kPairs ? n * sizeof(BFloat16) : sizeof(line));
    return line;
  }

  static void lay_out_keys(
      const BFloat16* k, int64_t stride, int64_t keys, int64_t width, float* to, float*) {
    for (int64_t first = 0; first < kPanel; first += kLanes) {
      for (int64_t c = 0; c < width; c += 2 * kPairs, to += kTileFloats) {
        Float lines[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          lines[i] = first + i < keys ? pairs(k + (first + i) * stride + c, width - c) : Float{};
        }
        transpose(lines);
        for (int i = 0; i < kLanes; ++i) store(to + i * kLanes, lines[i]);
      }
    }
  }

  static void lay_out_values(
      const BFloat16* v, int64_t stride, int64_t keys, int64_t channels, float* to, float*) {
    for (int64_t c = 0; c < kPanel; c += kLanes) {
      const auto bits = [&](int64_t key) {
        return key < keys ? bit_cast<UInt>(load_first(v + key * stride + c, channels - c)) : UInt{};
      };
      for (int64_t key = 0; key < keys; key += 2 * kPairs) {
        for (int64_t pair = key; pair < key + kPairs; ++pair, to += kLanes) {
          store(to, bit_cast<Float>(bits(pair) >> 16 | bits(pair + kPairs)));
        }
      }
    }
  }

  static float* line_of(float* rows, int64_t depth, int64_t row, int64_t tile) {
    return rows + (row / 16 * tiles(depth) + tile) * kTileFloats + row % 16 * kPairs;
  }

  void take_queries(const BFloat16* q, int64_t stride, int64_t count, int64_t width, float* to) {
    for (int64_t row = 0; row < count; ++row, q += stride) {
      for (int64_t tile = 0; tile < tiles(width); ++tile) {
        const int64_t c = tile * 2 * kPairs;
        store(line_of(to, width, row, tile), pairs(q + c, width - c));
      }
    }
  }

  void put(float* to, int64_t keys, int64_t row, int64_t group, const Float (&p)[4]) {
    for (int i = 0; i < 2; ++i) {
      auto* const line = reinterpret_cast<BFloat16*>(line_of(to, keys, row, 2 * group + i));
      store_pair(line, {p[2 * i], p[2 * i + 1]});
    }
  }

  void multiply(const float* a, const float* b, int64_t depth, float* m, int64_t count, bool adds) {
    count > 16 ? multiply<2>(a, b, depth, m, adds) : multiply<1>(a, b, depth, m, adds);
  }

  void finish() {}

 private:
  template <int kRowTiles>
  void multiply(const float* a, const float* b, int64_t depth, float* m, bool adds) {
    constexpr int64_t kStride = kPanel * sizeof(float);
    const int64_t next = tiles(depth) * kTileFloats;
    if (adds) {
      _tile_loadd(0, m, kStride);
      _tile_loadd(1, m + kLanes, kStride);
      if constexpr (kRowTiles == 2) {
        _tile_loadd(2, m + 16 * kPanel, kStride);
        _tile_loadd(3, m + 16 * kPanel + kLanes, kStride);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < next; k += kTileFloats) {
      _tile_loadd(4, a + k, 64);
      _tile_loadd(6, b + k, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + next + k, 64);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kRowTiles == 2) {
        _tile_loadd(5, a + next + k, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, m, kStride);
    _tile_stored(1, m + kLanes, kStride);
    if constexpr (kRowTiles == 2) {
      _tile_stored(2, m + 16 * kPanel, kStride);
      _tile_stored(3, m + 16 * kPanel + kLanes, kStride);
    }
  }

  Tiles configured_;
};

}  // namespace
}  // namespace ddpm_fast::cpu
