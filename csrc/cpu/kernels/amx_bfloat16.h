// Products of bfloat16 on AMX, 32 rows by 32 columns, summed in float32 in tiles 0 to 3.
//
// A tile of the processor is 16 rows of 64 bytes. One of a is 32 channels of 16 rows; one of b 32 channels of
// 16 columns: by lines, two channels' for each of them.
#pragma once

#include "amx_gemm.h"
#include "conv3x3_gemm.h"

namespace ddpm_fast::cpu {
namespace {

constexpr int kWidth = 32;                // channels of a tile
constexpr int64_t kTwoTiles = 2 * kTile;  // bytes

// Adds 32 rows of a, or the first 16, times b, each in two tiles.
template <int kRowTiles>
inline void add_products(const void* a0, const void* a1, const void* b0, const void* b1) {
  _tile_loadd(6, b0, 64);
  _tile_loadd(4, a0, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, b1, 64);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (kRowTiles == 2) {
    _tile_loadd(5, a1, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// As rows of 32.
template <int kRowTiles>
inline void load_sums(const float* m) {
  constexpr int64_t kRow = kPanel * sizeof(float);
  _tile_loadd(0, m, kRow);
  _tile_loadd(1, m + kLanes, kRow);
  if constexpr (kRowTiles == 2) {
    _tile_loadd(2, m + 16 * kPanel, kRow);
    _tile_loadd(3, m + 16 * kPanel + kLanes, kRow);
  }
}

template <int kRowTiles>
inline void store_sums(float* m) {
  constexpr int64_t kRow = kPanel * sizeof(float);
  _tile_stored(0, m, kRow);
  _tile_stored(1, m + kLanes, kRow);
  if constexpr (kRowTiles == 2) {
    _tile_stored(2, m + 16 * kPanel, kRow);
    _tile_stored(3, m + 16 * kPanel + kLanes, kRow);
  }
}

}  // namespace
}  // namespace ddpm_fast::cpu
