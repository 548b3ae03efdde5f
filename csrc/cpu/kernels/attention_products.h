// Attention's two products in float32, on any instruction set, by conv3x3's kernel.
#pragma once

#include "conv3x3_gemm.h"
#include "transpose.h"

namespace ddpm_fast::cpu {
namespace {

// The first n of kLanes numbers; n may be more, or less than 1.
template <typename T>
inline Float load_first(const T* from, int64_t n) {
  return n >= kLanes ? load(from) : n > 0 ? load(from, n) : Float{};
}

// kPanel keys as columns, [channel][kPanel]; what is not there is zero.
template <typename T>
inline void transpose_keys(const T* k, int64_t stride, int64_t keys, int64_t width, float* to) {
  for (int64_t c = 0; c < width; c += kLanes) {
    for (int half = 0; half < 2; ++half) {
      Float rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t key = half * kLanes + i;
        rows[i] = key < keys ? load_first(k + key * stride + c, width - c) : Float{};
      }
      transpose(rows);
      for (int i = 0; i < kLanes && c + i < width; ++i) {
        store(to + (c + i) * kPanel + half * kLanes, rows[i]);
      }
    }
  }
}

// Rows are laid out [c / kLanes][kBlock][kLanes], columns [c][kPanel].
template <typename T>
struct FloatProducts {
  using Element = T;
  static constexpr int64_t kBlock = 2 * kMaxRows;  // queries: keys and values come from the second cache

  static int64_t rows_size(int64_t depth) { return ceil_div(depth, kLanes) * kBlock * kLanes; }
  static int64_t columns_size(int64_t depth) { return depth * kPanel; }
  static int64_t scratch_size(int64_t) { return 0; }

  static void lay_out_keys(const T* k, int64_t stride, int64_t keys, int64_t width, float* to, float*) {
    transpose_keys(k, stride, keys, width, to);
  }

  static void lay_out_values(const T* v, int64_t stride, int64_t keys, int64_t channels, float* to, float*) {
    for (int64_t key = 0; key < keys; ++key, v += stride, to += kPanel) {
      store(to, load_first(v, channels));
      store(to + kLanes, channels > kLanes ? load_first(v + kLanes, channels - kLanes) : Float{});
    }
  }

  void take_queries(const T* q, int64_t stride, int64_t count, int64_t width, float* to) {
    for (int64_t row = 0; row < count; ++row, q += stride) {
      for (int64_t c = 0; c < width; c += kLanes) {
        store(to + c * kBlock + row * kLanes, load_first(q + c, width - c));
      }
    }
  }

  void put(float* to, int64_t, int64_t row, int64_t group, const Float (&p)[4]) {
    for (int i = 0; i < 4; ++i) store(to + ((4 * group + i) * kBlock + row) * kLanes, p[i]);
  }

  void score(const float* a, const float* b, int64_t depth, float* m, int64_t count) {
    sum(a, b, depth, m, count, false);
  }

  void sum(const float* a, const float* b, int64_t depth, float* m, int64_t count, bool adds) {
    const int64_t pieces = ceil_div(count, kMaxRows);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t row = piece * count / pieces, rows = (piece + 1) * count / pieces - row;
      cpu::multiply(rows, adds, {a + row * kLanes, kBlock * kLanes, b, depth, b, 0, m + row * kPanel});
    }
  }

  void finish() {}
};

}  // namespace
}  // namespace ddpm_fast::cpu
