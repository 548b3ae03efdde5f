// The products of a convolution at one position: m[row][kPanel] = sum over c of a[row][c] b[c][kPanel].
//
// a is laid out [c / kLanes][rows of the block][kLanes], so that each of its addresses is one pointer and a
// constant; b is [c][kPanel]. A kernel holds its rows' sums in registers: 14 rows of 2 registers, 2 of b and
// one of a fill AVX-512's 32. Each value of a is broadcast once and used twice.
#pragma once

#include <cstddef>
#include <utility>

#include "vec.h"

namespace ddpm_fast::cpu {
namespace {

constexpr int kPanel = 2 * kLanes;  // output channels that are computed together
#if defined(__AVX512F__)
constexpr int kMaxRows = 14;
#else
constexpr int kMaxRows = 6;
#endif

struct Product {
  const float* a;
  int64_t a_block;  // from a block of kLanes channels to the next
  const float* b;
  int64_t channels;
  const float* ahead;  // of b: what is wanted next, brought to the second cache meanwhile
  int64_t ahead_step;  // in floats, a channel
  float* m;
};

template <int kRows, bool kAdds>
inline void multiply_rows(const Product& of) {
  Float sums[kRows][2] = {};
  const float *a = of.a, *b = of.b, *ahead = of.ahead;
  for (int64_t c = 0; c < of.channels; c += kLanes, a += of.a_block) {
    const int64_t count = of.channels - c < kLanes ? of.channels - c : kLanes;
    const float* from = a;
    for (int64_t l = 0; l < count; ++l, ++from, b += kPanel, ahead += of.ahead_step) {
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + of.ahead_step / 2, 0, 2);
      const Float b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 14
      for (int r = 0; r < kRows; ++r) {
        const Float value = broadcast(from[r * kLanes]);
        sums[r][0] += value * b0;
        sums[r][1] += value * b1;
      }
    }
  }
  float* m = of.m;
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r, m += kPanel) {
    if constexpr (kAdds) {
      sums[r][0] += load(m);
      sums[r][1] += load(m + kLanes);
    }
    store(m, sums[r][0]);
    store(m + kLanes, sums[r][1]);
  }
}

template <bool kAdds, size_t... kLess>
inline void multiply_some_rows(int64_t rows, const Product& of, std::index_sequence<kLess...>) {
  static constexpr void (*kByRows[])(const Product&) = {multiply_rows<kLess + 1, kAdds>...};
  kByRows[rows - 1](of);
}

// `rows` rows of m, 1 to kMaxRows, to which the products are added if `adds`.
inline void multiply(int64_t rows, bool adds, const Product& of) {
  constexpr std::make_index_sequence<kMaxRows> less;
  adds ? multiply_some_rows<true>(rows, of, less) : multiply_some_rows<false>(rows, of, less);
}

}  // namespace
}  // namespace ddpm_fast::cpu
