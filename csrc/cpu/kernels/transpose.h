// kLanes registers as a square of numbers, turned about its diagonal.
#pragma once

#include "vec.h"

namespace ddpm_fast::cpu {
namespace {

inline void transpose(Float (&rows)[kLanes]) {
#if defined(__AVX512F__)
  // Row i beside row i + 8, number by number, is one turn of the index's bits; four turns swap row and lane.
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  for (int turn = 0; turn < 4; ++turn) {
    Float turned[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      turned[2 * i] = _mm512_permutex2var_ps(rows[i], low, rows[i + kLanes / 2]);
      turned[2 * i + 1] = _mm512_permutex2var_ps(rows[i], high, rows[i + kLanes / 2]);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = turned[i];
  }
#else
  float numbers[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) store(numbers[i], rows[i]);
  for (int i = 0; i < kLanes; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) rows[i][lane] = numbers[lane][i];
  }
#endif
}

}  // namespace
}  // namespace ddpm_fast::cpu
