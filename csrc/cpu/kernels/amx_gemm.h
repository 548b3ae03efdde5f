// m[row][16] = unit of the row * unit of the column * sum over channels of the digits' products, on AMX.
#pragma once

#include "amx_digits.h"
#include "conv3x3_gemm.h"

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
  int64_t b_columns;     // bytes, to the next 16 columns
  const float* columns;  // units, kPanel
  int64_t depth;         // tiles of kDepth channels
  const int8_t* ahead;   // of b: what is wanted next, brought to the second cache meanwhile
  int64_t ahead_step;    // in bytes, for each 12 products of tiles
  float* m;              // kPanel columns
  int64_t m_stride;      // in floats, from a row to the next
  int64_t count;         // of rows, 1 to 32
  const float* offset;   // is added to each row, kPanel
  const float* plus;     // and this, laid out as m, which it may be; or null
};

constexpr float kNoOffset[kPanel] = {};

// What is brought to the second cache, a part at a time.
struct Ahead {
  const int8_t* line;
  const int8_t* wanted;
  int64_t step;

  void bring() {
    for (wanted += step; line < wanted; line += 64) __builtin_prefetch(line, 0, 2);
  }
};

// Up to 32 rows' products with kPanel columns. The tiles' sums go to m beside the next ones' multiplication,
// some rows after each step: vectors and tiles are different units of the processor.
class DigitProducts {
 public:
  void multiply(const DigitProduct& of) {
    of.count > 16 ? multiply_32(of) : multiply_16(of);
    pending_ = of;
  }

  void finish() {
    write(0, pending_.count);
    pending_.count = 0;
  }

 private:
  // Place by place: four tiles of sums leave two for a and two for b, and each that is loaded serves twice.
  // From the second cache that takes longer than a product.
  void multiply_32(const DigitProduct& of) {
    Ahead ahead = {of.ahead, of.ahead, of.ahead_step / 6};
    place<4>(of, ahead);
    place<3>(of, ahead);
    place<2>(of, ahead);
  }

  template <int kPlace>
  inline void place(const DigitProduct& of, Ahead& ahead) {
    const int64_t rows = pending_rows(3 * of.depth);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int8_t *a = of.a, *b = of.b;
    int64_t row = 0;
    for (int64_t k = 0; k < of.depth; ++k, a += kDigits * kTile, b += kDigits * kTile) {
#pragma GCC unroll 3
      for (int digit = 0; digit <= kPlace - 2; ++digit) {
        const int8_t* const a0 = a + digit * kTile;
        const int8_t* const b0 = b + (kPlace - 2 - digit) * kTile;
        _tile_loadd(4, a0, 64);
        _tile_loadd(6, b0, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(5, a0 + of.a_rows, 64);
        _tile_dpbssd(1, 5, 6);
        _tile_loadd(7, b0 + of.b_columns, 64);
        _tile_dpbssd(2, 4, 7);
        _tile_dpbssd(3, 5, 7);
        ahead.bring();
        if constexpr (kPlace == 4) {  // the first: its sums go where those are that are pending
          write(row, row + rows);
          row += rows;
        }
      }
    }
    auto& sums = sums_[kPlace - 2];
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[0][16], 64);
    _tile_stored(2, sums[1], 64);
    _tile_stored(3, sums[1][16], 64);
  }

  // 16 rows wait for the weights' way from memory, which is shortest where they are read in order.
  void multiply_16(const DigitProduct& of) {
    Ahead ahead = {of.ahead, of.ahead, of.ahead_step / 2};
    const int64_t rows = pending_rows(of.depth);
    for (int half = 0; half < 2; ++half) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      const int8_t *a = of.a, *b = of.b + half * of.b_columns;
      int64_t row = 0;
      for (int64_t k = 0; k < of.depth; ++k, a += kDigits * kTile, b += kDigits * kTile) {
        _tile_loadd(3, a, 64);
        _tile_loadd(4, a + kTile, 64);
        _tile_loadd(5, a + 2 * kTile, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbssd(0, 3, 6);
        _tile_dpbssd(1, 4, 6);
        _tile_dpbssd(2, 5, 6);
        _tile_loadd(7, b + kTile, 64);
        _tile_dpbssd(1, 3, 7);
        _tile_dpbssd(2, 4, 7);
        _tile_loadd(6, b + 2 * kTile, 64);
        _tile_dpbssd(2, 3, 6);
        ahead.bring();
        if (half == 0) {
          write(row, row + rows);
          row += rows;
        }
      }
      _tile_stored(0, sums_[0][half], 64);
      _tile_stored(1, sums_[1][half], 64);
      _tile_stored(2, sums_[2][half], 64);
    }
  }

  int64_t pending_rows(int64_t steps) const {  // for each of them
    return (static_cast<uint32_t>(pending_.count) + steps - 1) / static_cast<uint32_t>(steps);
  }

  void write(int64_t first, int64_t last) {
    last = last < pending_.count ? last : pending_.count;
    pending_.plus != nullptr ? write<true>(first, last) : write<false>(first, last);
  }

  template <bool kPlus>
  void write(int64_t first, int64_t last) {
    if (first >= last) return;
    const DigitProduct& of = pending_;
    const Float columns[2] = {load(of.columns), load(of.columns + kLanes)};
    const Float offset[2] = {load(of.offset), load(of.offset + kLanes)};
    float* m = of.m + first * of.m_stride;
    const float* plus = kPlus ? of.plus + first * of.m_stride : nullptr;
    for (int64_t row = first; row < last; ++row, m += of.m_stride) {
      for (int half = 0; half < 2; ++half) {
        const auto places = [&](int place) {
          Int sum;
          std::memcpy(&sum, sums_[place - 2][half][row], sizeof(sum));
          return sum;
        };
        const Int low = places(3) + (places(4) >> 8);
        const Float sum =
            __builtin_convertvector(places(2), Float) * 256 + __builtin_convertvector(low, Float);
        Float value = sum * (columns[half] * of.rows[row]) + offset[half];
        if constexpr (kPlus) value += load(plus + half * kLanes);
        store(m + half * kLanes, value);
      }
      if constexpr (kPlus) plus += of.m_stride;
    }
  }

  alignas(64) int32_t sums_[kDigits][2][32][16];  // by place and half
  DigitProduct pending_ = {};
};

}  // namespace
}  // namespace ddpm_fast::cpu
