// Products of bfloat16 on AMX, 32 rows by 32 columns, in float32; and what becomes of them, written as
// bfloat16 beside the next ones' multiplication.
//
// A tile of the processor is 16 rows of 64 bytes. One of a is 32 channels of 16 rows; one of b 32 channels of
// 16 columns: by lines, two channels' for each of them.
#pragma once

#include "../kernels.h"
#include "amx_gemm.h"
#include "conv3x3_gemm.h"

namespace ddpm_fast::cpu {
namespace {

constexpr int kWidth = 32;                // channels of a tile
constexpr int64_t kTwoTiles = 2 * kTile;  // bytes, of a's two or b's two that are used together

// 32 rows of a, or 16, times 32 columns of b, one tile's width, added to the sums in tiles 0 to 3.
template <int kRowTiles>
inline void add_products(const char* a, const char* b) {
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

// The weights of panels [first, last) for b; place(position, c) is where 32 channels' two tiles go in a
// panel.
template <typename Convolution, typename Place>
inline void pack_bfloat16(
    const Conv3x3Plan& plan, const Conv3x3Weight<const float>& weight, int64_t first, int64_t last,
    float* packed, float* scratch, const Place& place) {
  constexpr int kPositions = Convolution::kRows * Convolution::kColumns;
  const int64_t depth = (plan.in_channels + kWidth - 1) / kWidth, channels = depth * kWidth;
  for (int64_t panel = first; panel < last; ++panel) {
    std::memset(scratch, 0, kPositions * channels * kPanel * sizeof(float));
    Convolution::each_weight(plan, weight, panel, [&](int position, int64_t c, int half, Float u) {
      store(scratch + (position * channels + c) * kPanel + half * kLanes, u);
    });
    for (int position = 0; position < kPositions; ++position) {
      for (int64_t c = 0; c < depth; ++c) {
        const float* const from = scratch + (position * channels + c * kWidth) * kPanel;
        auto* to = reinterpret_cast<BFloat16*>(packed + panel * plan.panel_size) +
                   place(position, c) * kTwoTiles / static_cast<int64_t>(sizeof(BFloat16));
        for (int tile = 0; tile < 2; ++tile) {
          for (int line = 0; line < 16; ++line, to += 2 * kLanes) {
            const float* const u = from + 2 * line * kPanel + tile * kLanes;
            store_pair(to, {load(u), load(u + kPanel)});
          }
        }
      }
    }
  }
}

// Where a panel's 32 output channels of a pixel go.
struct PanelOutput {
  Float bias[2];
  const BFloat16* plus;  // as y, or null
  BFloat16* y;
  int64_t channels;  // from a pixel to the next
  __mmask32 inside;  // of the panel

  PanelOutput() = default;

  PanelOutput(const Conv3x3Plan& plan, int64_t panel, const float* bias_, const void* plus_, void* y_)
      : bias{}, channels(plan.out_channels) {
    const int64_t k = panel * kPanel, left = channels - k;
    plus = plus_ == nullptr ? nullptr : static_cast<const BFloat16*>(plus_) + k;
    y = static_cast<BFloat16*>(y_) + k;
    inside = left < kPanel ? (1u << left) - 1 : ~0u;
    for (int half = 0; half < 2 && bias_ != nullptr && left > half * kLanes; ++half) {
      const float* const from = bias_ + k + half * kLanes;
      bias[half] = left < (half + 1) * kLanes ? load(from, left - half * kLanes) : load(from);
    }
  }

  inline void write(int64_t pixel, Float first, Float second) const {
    first += bias[0], second += bias[1];
    const int64_t at = pixel * channels;
    if (plus != nullptr) {
      const __m512i both = _mm512_maskz_loadu_epi16(inside, plus + at);
      first += widened(_mm512_castsi512_si256(both));
      second += widened(_mm512_extracti64x4_epi64(both, 1));
    }
    const __m512bh rounded = _mm512_cvtne2ps_pbh(second, first);
    _mm512_mask_storeu_epi16(y + at, inside, bit_cast<__m512i>(rounded));
  }

  static inline Float widened(__m256i halves) {
    return bit_cast<Float>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
};

}  // namespace
}  // namespace ddpm_fast::cpu
