// m[row][16] = unit of the row * unit of the column * sum over channels of the digits' products, on AMX.
#pragma once

#include "amx_digits.h"

namespace ddpm_fast::cpu {
namespace {

// Every tile 16 rows of 64 bytes, as long as this lives: oneDNN has a configuration of its own, and a thread
// with one that it does not use has more to save at each switch.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    // gcc's own says that 8 bytes are read. "memory": nor does gcc know that tiles are loaded from there.
    asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

struct DigitProduct {
  const int8_t* a;       // [depth][digit][tile]
  int64_t a_rows;        // bytes, to the next 16 rows
  const float* rows;     // units
  const int8_t* b;       // [depth][digit][tile]
  const float* columns;  // units
  int64_t depth;         // tiles of kDepth channels
  const int8_t* ahead;   // of b: what is wanted next, brought to the second cache meanwhile
  int64_t ahead_step;    // in bytes, for each tile of kDepth channels
  float* m;              // rows kPanel apart
  int64_t count;         // of rows, 1 to 32
  bool adds;             // to what is in m
};

// 32 rows' products with 16 columns, or 16 rows'. The tiles' sums go to m beside the next ones'
// multiplication, some rows after each step: vectors and tiles are different units of the processor.
class DigitProducts {
 public:
  void multiply(const DigitProduct& of) { of.count > 16 ? multiply<2>(of) : multiply<1>(of); }

  void finish() { write(0, pending_.count); }

 private:
  template <int kRowTiles>
  void multiply(const DigitProduct& of) {
    _tile_zero(0);  // places 2, 3 and 4 are summed in tiles 0 1, 2 3 and 4 5
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    const int64_t rows = (32 + static_cast<uint32_t>(of.depth) - 1) / static_cast<uint32_t>(of.depth);
    const int8_t *a = of.a, *b = of.b, *ahead = of.ahead;
    for (int64_t k = 0; k < of.depth; ++k, a += kDigits * kTile, b += kDigits * kTile) {
      step<kRowTiles>(a, a + of.a_rows, b);
      for (const int8_t* const last = ahead + of.ahead_step; ahead < last; ahead += 64) {
        __builtin_prefetch(ahead, 0, 2);
      }
      write(k * rows, (k + 1) * rows);
    }
    _tile_stored(0, sums_[0], 64);
    _tile_stored(2, sums_[1], 64);
    _tile_stored(4, sums_[2], 64);
    if constexpr (kRowTiles == 2) {
      _tile_stored(1, sums_[0][16], 64);
      _tile_stored(3, sums_[1][16], 64);
      _tile_stored(5, sums_[2][16], 64);
    }
    pending_ = of;
  }

  template <int kRowTiles>
  static inline void step(const int8_t* a0, const int8_t* a1, const int8_t* b) {
#define MULTIPLY(first, second, digit)            \
  _tile_loadd(6, a0 + (digit - 1) * kTile, 64);   \
  _tile_dpbssd(first, 6, 7);                      \
  if constexpr (kRowTiles == 2) {                 \
    _tile_loadd(6, a1 + (digit - 1) * kTile, 64); \
    _tile_dpbssd(second, 6, 7);                   \
  }
    _tile_loadd(7, b, 64);
    MULTIPLY(0, 1, 1)
    MULTIPLY(2, 3, 2)
    MULTIPLY(4, 5, 3)
    _tile_loadd(7, b + kTile, 64);
    MULTIPLY(2, 3, 1)
    MULTIPLY(4, 5, 2)
    _tile_loadd(7, b + 2 * kTile, 64);
    MULTIPLY(4, 5, 1)
#undef MULTIPLY
  }

  void write(int64_t first, int64_t last) {
    last = last < pending_.count ? last : pending_.count;
    pending_.adds ? write<true>(first, last) : write<false>(first, last);
  }

  template <bool kAdds>
  void write(int64_t first, int64_t last) {
    if (first >= last) return;
    const Float columns = load(pending_.columns);
    const float* const units = pending_.rows;
    float* m = pending_.m + first * 2 * kLanes;
    for (int64_t row = first; row < last; ++row, m += 2 * kLanes) {
      const auto places = [&](int place) {
        Int sum;
        std::memcpy(&sum, sums_[place][row], sizeof(sum));
        return sum;
      };
      const Int low = places(1) + (places(2) >> 8);
      const Float sum = __builtin_convertvector(places(0), Float) * 256 + __builtin_convertvector(low, Float);
      const Float unit = columns * units[row];
      store(m, kAdds ? load(m) + sum * unit : sum * unit);
    }
  }

  alignas(64) int32_t sums_[kDigits][32][16];  // by the digits' places, 2, 3 and 4 together
  DigitProduct pending_ = {};
};

}  // namespace
}  // namespace ddpm_fast::cpu
