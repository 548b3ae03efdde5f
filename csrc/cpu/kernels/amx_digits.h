// Numbers as digits of base 256, which AMX multiplies exactly (the Ozaki scheme; Ozaki et al. 2012, on
// integers Ootomo et al. 2024): v = (d1 + d2 / 2^8 + d3 / 2^16) * 2^-7 max|v| in one row, digits in
// [-128, 127]. Of the products of two numbers of three digits, six are taken, those whose digits' places add
// up to 4 at most. What is left out is 2^-24 max|a| max|b| and less; sums are integers, exact.
//
// A tile of the processor is 16 rows of 64 bytes. One of a is 16 rows' digits of 64 channels; one of b the
// digits of 64 channels for 16 output channels: by lines, four channels' for each of them. Line l has the
// channels l, 16 + l, 32 + l and 48 + l: whatever the order, it only has to be that of a.
#pragma once

#include "vec.h"

namespace ddpm_fast::cpu {
namespace {

constexpr int kDepth = 64;      // channels of a tile
constexpr int kMostDepth = 4;   // tiles whose sums stay integers: 32 rows of them fit the first cache
constexpr int kTile = 16 * 64;  // bytes
constexpr int kDigits = 3;
constexpr float kLargest = 0x7F7F00;      // its digits, and those of what rounds to it, are in range
constexpr float kUnit = 4096 / kLargest;  // of a row with max|v| = 1; the 2^-12 are in the products
constexpr float kSmallest = 0x1p-100f;    // of max|v|: rows of smaller numbers lose digits

// The largest magnitudes, lane by lane, as bits: an infinity is larger than any number, a NaN larger still.
struct Magnitude {
  Int bits = {};

  void see(Float value) {
    const Int magnitude = bit_cast<Int>(value) & 0x7FFFFFFF;
    bits = bits > magnitude ? bits : magnitude;
  }
};

// Lane k: the largest of rows[k]'s lanes.
inline Int largest_of(const Magnitude (&rows)[16]) {
  const auto most = [](__m512i a, __m512i b) { return _mm512_max_epi32(a, b); };
  __m512i eight[8], four[4], two[2];
  for (int k = 0; k < 8; ++k) {
    const auto a = bit_cast<__m512i>(rows[2 * k].bits), b = bit_cast<__m512i>(rows[2 * k + 1].bits);
    eight[k] = most(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  }
  for (int k = 0; k < 4; ++k) {
    const __m512i a = eight[2 * k], b = eight[2 * k + 1];
    four[k] = most(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  const auto quarters = [&](__m512i a, __m512i b) {
    return most(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
  };
  for (int k = 0; k < 2; ++k) two[k] = quarters(four[2 * k], four[2 * k + 1]);
  return bit_cast<Int>(quarters(two[0], two[1]));
}

// What rows of such magnitudes are multiplied by to be integers, and their units: NaN for one that is not
// finite, and 0 for one of zeros, since a tiny one times another would be denormal, which is slow.
struct Scale {
  Float to, unit;

  explicit Scale(Int magnitudes) {
    const Float magnitude = bit_cast<Float>(magnitudes);
    const Float largest = magnitude > kSmallest ? magnitude : Float{} + kSmallest;
    to = kLargest / largest;
    const Float finite = magnitudes > 0 ? largest * kUnit : Float{};
    unit = magnitudes < 0x7F800000 ? finite : Float{} + __builtin_nanf("");
  }
};

inline UInt select(uint32_t mask, UInt a, UInt b) { return (a & mask) | (b & ~mask); }

// Four registers' digits, the first digits of all of them 64 bytes, then the second, and the third. Balanced:
// with 128 added to each, they are the bytes of an unsigned number.
inline void store_digits(const Float (&values)[4], Float scale, int8_t* to, int64_t stride) {
  UInt q[4];
  for (int i = 0; i < 4; ++i) {
    q[i] = bit_cast<UInt>(_mm512_cvtps_epi32(bit_cast<__m512>(values[i] * scale))) + 0x808080;
  }
  const UInt even[2] = {select(0x00FF00FF, q[0], q[1] << 8), select(0x00FF00FF, q[2], q[3] << 8)};
  const UInt odd[2] = {select(0x00FF00FF, q[0] >> 8, q[1]), select(0x00FF00FF, q[2] >> 8, q[3])};
  const UInt digits[kDigits] = {
      select(0xFFFF, even[0] >> 16, even[1]),
      select(0xFFFF, odd[0], odd[1] << 16),
      select(0xFFFF, even[0], even[1] << 16),
  };
  for (int d = 0; d < kDigits; ++d) {
    const UInt bytes = digits[d] ^ 0x80808080;
    std::memcpy(to + d * stride, &bytes, sizeof(bytes));
  }
}

}  // namespace
}  // namespace ddpm_fast::cpu
