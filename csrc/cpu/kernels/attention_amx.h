// Attention's two products on AMX: of float32 as int8 digits, see amx_digits.h, and of bfloat16.
#pragma once

#include "amx_bfloat16.h"
#include "attention.h"

namespace ddpm_fast::cpu {
namespace {

// Weights times values: m[row][16] = unit of the column * sum over keys. A row's largest weight is 1, and
// most are much smaller: of two digits' products, those whose places add up to 5 count too, eight in all.
class WeightedDigits {
 public:
  struct Sum {
    const int8_t* a;       // [depth][digit][tile]
    const int8_t* b;       // [depth][digit][tile]
    const float* columns;  // units
    int64_t depth;         // tiles of kDepth keys, kMostDepth at most
    float* m;              // rows kPanel apart
    int64_t count;         // of rows, 1 to 16
    bool adds;             // to what is in m
  };

  void multiply(const Sum& of) {
    _tile_zero(0);  // places 2 to 5
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int64_t rows = ceil_div(16, of.depth);
    const int8_t *a = of.a, *b = of.b;
    for (int64_t k = 0; k < of.depth; ++k, a += kDigits * kTile, b += kDigits * kTile) {
      _tile_loadd(7, b, 64);
      _tile_loadd(6, a + 2 * kTile, 64);
      _tile_dpbssd(2, 6, 7);
      _tile_loadd(5, a + kTile, 64);
      _tile_dpbssd(1, 5, 7);
      _tile_loadd(4, a, 64);
      _tile_dpbssd(0, 4, 7);
      _tile_loadd(7, b + kTile, 64);
      _tile_dpbssd(3, 6, 7);
      _tile_dpbssd(2, 5, 7);
      _tile_dpbssd(1, 4, 7);
      _tile_loadd(7, b + 2 * kTile, 64);
      _tile_dpbssd(3, 5, 7);
      _tile_dpbssd(2, 4, 7);
      write(k * rows, (k + 1) * rows);
    }
    _tile_stored(0, sums_[0], 64);
    _tile_stored(1, sums_[1], 64);
    _tile_stored(2, sums_[2], 64);
    _tile_stored(3, sums_[3], 64);
    pending_ = of;
  }

  void finish() {
    write(0, pending_.count);
    pending_.count = 0;
  }

 private:
  // Beside the next ones' multiplication: vectors and tiles are different units of the processor.
  void write(int64_t first, int64_t last) {
    last = last < pending_.count ? last : pending_.count;
    if (first >= last) return;
    const Float columns = load(pending_.columns) * (kUnit / 256);
    float* m = pending_.m + first * kPanel;
    for (int64_t row = first; row < last; ++row, m += kPanel) {
      const auto place = [&](int of) {
        Int sum;
        std::memcpy(&sum, sums_[of - 2][row], sizeof(sum));
        return sum;
      };
      const Float low = __builtin_convertvector(place(4) + (place(5) >> 8), Float);
      const Float mid = __builtin_convertvector(place(3), Float) * 256 + low;
      const Float sum = __builtin_convertvector(place(2), Float) * 65536 + mid;
      store(m, pending_.adds ? load(m) + sum * columns : sum * columns);
    }
  }

  alignas(64) int32_t sums_[4][16][16];  // by the digits' places
  Sum pending_ = {};
};

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
    store_digits(p, broadcast(kLargest), line_of(to, keys, row, group), kTile);
  }

  void score(const float* a, const float* b, int64_t depth, float* m, int64_t count) {
    const int64_t of_tile = kDigits * kTile, next = tiles(depth) * of_tile;
    const auto* const rows = reinterpret_cast<const int8_t*>(a);
    const auto* const columns = reinterpret_cast<const int8_t*>(b);
    for (int64_t k = 0; k < tiles(depth); k += kMostDepth) {
      const int8_t* const at = columns + k * of_tile;
      scores_.multiply({
          rows + k * of_tile,
          next,
          a + units_at(depth),
          at,
          next,
          b + units_at(depth),
          tiles(depth) - k < kMostDepth ? tiles(depth) - k : kMostDepth,
          at,
          0,
          m,
          kPanel,
          count,
          kNoOffset,
          k > 0 ? m : nullptr,
      });
    }
  }

  void sum(const float* a, const float* b, int64_t depth, float* m, int64_t count, bool adds) {
    const int64_t of_tile = kDigits * kTile, next = tiles(depth) * of_tile;
    const auto* const rows = reinterpret_cast<const int8_t*>(a);
    const auto* const columns = reinterpret_cast<const int8_t*>(b);
    for (int half = 0; half < 2; ++half) {
      for (int64_t k = 0; k < tiles(depth); k += kMostDepth) {
        for (int64_t row = 0; row < count; row += 16) {
          sums_.multiply({
              rows + row / 16 * next + k * of_tile,
              columns + half * next + k * of_tile,
              b + units_at(depth) + half * kLanes,
              tiles(depth) - k < kMostDepth ? tiles(depth) - k : kMostDepth,
              m + row * kPanel + half * kLanes,
              count - row < 16 ? count - row : 16,
              adds || k > 0,
          });
        }
      }
    }
  }

  void finish() {
    scores_.finish();
    sums_.finish();
  }

 private:
  Tiles configured_;
  DigitProducts scores_;
  WeightedDigits sums_;
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
      store_pair_near(line, {p[2 * i], p[2 * i + 1]});
    }
  }

  void score(const float* a, const float* b, int64_t depth, float* m, int64_t count) {
    sum(a, b, depth, m, count, false);
  }

  void sum(const float* a, const float* b, int64_t depth, float* m, int64_t count, bool adds) {
    count > 16 ? multiply<2>(a, b, depth, m, adds) : multiply<1>(a, b, depth, m, adds);
  }

  void finish() {}

 private:
  template <int kRowTiles>
  void multiply(const float* a, const float* b, int64_t depth, float* m, bool adds) {
    const int64_t next = tiles(depth) * kTileFloats;
    adds ? load_sums<kRowTiles>(m) : zero_sums();
    for (int64_t k = 0; k < next; k += kTileFloats) {
      add_products<kRowTiles>(a + k, a + next + k, b + k, b + next + k);
    }
    store_sums<kRowTiles>(m);
  }

  Tiles configured_;
};

// With few tokens or channels most of a digit's tile is empty: the vectors are then faster.
struct AttentionDigits {
  using Narrow = Attention<FloatProducts<float>>;
  using Wide = Attention<DigitsProducts>;

  static bool is_narrow(int64_t tokens, int64_t width) { return tokens < 64 || width < 64; }

  static AttentionPlan plan(int64_t tokens, int64_t width, int64_t threads) {
    return is_narrow(tokens, width) ? Narrow::plan(tokens, width, threads)
                                    : Wide::plan(tokens, width, threads);
  }

  static void lay_out(
      const AttentionPlan& plan, const AttentionHead& head, int64_t first, int64_t last, float* to,
      float* scratch) {
    const auto run = is_narrow(plan.tokens, plan.width) ? Narrow::lay_out : Wide::lay_out;
    run(plan, head, first, last, to, scratch);
  }

  static void attend(
      const AttentionPlan& plan, const AttentionHead& head, const float* laid_out, int64_t first,
      int64_t last, float* scratch) {
    const auto run = is_narrow(plan.tokens, plan.width) ? Narrow::attend : Wide::attend;
    run(plan, head, laid_out, first, last, scratch);
  }

  static constexpr AttentionKernels kKernels = {plan, lay_out, attend};
};

}  // namespace
}  // namespace ddpm_fast::cpu
