// Winograd's minimal filtering F(m, 3) in one dimension (Lavin & Gray 2016): m outputs of a correlation with
// 3 taps from m + 2 inputs, with m + 2 products instead of 3 m. In two, F(m x n, 3 x 3), one after the other:
//
//   Y = A' [(G g H') * (B' d C)] D,  with B', G, A' of F(m, 3) and C', H, D' of F(n, 3)
//
// Toom-Cook: d and g stand for polynomials, a row of B' or G for a point at which they are evaluated. The
// points decide the error. For m = 4 they are (0, +-5/8, +-3/2, infinity): half the error of the customary
// (0, +-1, +-2, infinity), with as many instructions. F(1, 3) is the direct convolution, whose products are
// summed; F(1, 1) a product.
#pragma once

#include "../kernels.h"
#include "vec.h"

namespace ddpm_fast::cpu {
namespace {

template <int kTile, int kTaps, Resize kResize = Resize::kNone>
struct Winograd;

template <int kTaps, Resize kResize>
struct Winograd<1, kTaps, kResize> {
  static constexpr int kSize = kTaps, kProducts = 1;  // that are left when the multiplication has summed them

  static inline void input(const Float (&d)[kTaps], Float (&v)[kTaps]) {
    for (int k = 0; k < kTaps; ++k) v[k] = d[k];
  }

  static inline void weight(const Float (&g)[kTaps], Float (&u)[kTaps]) {
    for (int k = 0; k < kTaps; ++k) u[k] = g[k];
  }

  static inline void output(const Float (&m)[1], Float (&y)[1]) { y[0] = m[0]; }
};

template <>
struct Winograd<2, 3> {
  static constexpr int kSize = 4, kProducts = 4;

  static inline void input(const Float (&d)[4], Float (&v)[4]) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }

  static inline void weight(const Float (&g)[3], Float (&u)[4]) {
    const Float even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];
    u[0] = g[0];
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = g[2];
  }

  static inline void output(const Float (&m)[4], Float (&y)[2]) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) - m[3];
  }
};

// Of d[0] d[0] d[1] d[1] d[2] d[2], from the second on: one of F(2, 3)'s products would be of zeros.
template <>
struct Winograd<2, 3, Resize::kUp> {
  static constexpr int kSize = 3, kProducts = 3;

  static inline void input(const Float (&d)[3], Float (&v)[3]) {
    v[0] = d[0] - d[1];
    v[1] = d[1];
    v[2] = d[2] - d[1];
  }

  static inline void weight(const Float (&g)[3], Float (&u)[3]) {
    u[0] = g[0];
    u[1] = (g[0] + g[2]) + g[1];
    u[2] = g[2];
  }

  static inline void output(const Float (&m)[3], Float (&y)[2]) {
    y[0] = m[0] + m[1];
    y[1] = m[1] + m[2];
  }
};

// Stride 2: F(2, 2) of every other input with the outer taps, and the middle tap's two products.
template <>
struct Winograd<2, 3, Resize::kDown> {
  static constexpr int kSize = 5, kProducts = 3;  // the first two are summed, and the next two

  static inline void input(const Float (&d)[5], Float (&v)[5]) {
    v[0] = d[0] - d[2];
    v[1] = d[1];
    v[2] = d[4] - d[2];
    v[3] = d[3];
    v[4] = d[2];
  }

  static inline void weight(const Float (&g)[3], Float (&u)[5]) {
    u[0] = g[0];
    u[1] = u[3] = g[1];
    u[2] = g[2];
    u[4] = g[0] + g[2];
  }

  static inline void output(const Float (&m)[3], Float (&y)[2]) {
    y[0] = m[0] + m[2];
    y[1] = m[1] + m[2];
  }
};

template <>
struct Winograd<4, 3> {
  static constexpr int kSize = 6, kProducts = 6;
  static constexpr float p = 5.0f / 8, q = 3.0f / 2, pp = p * p, qq = q * q;  // exact, with their products
  static constexpr double n0 = 1 / (5.0 / 8 * 5 / 8 * 3 / 2 * 3 / 2);  // 1 / prod (a_i - a_j), by point
  static constexpr double np = 1 / (2 * 5.0 / 8 * 5 / 8 * (5.0 / 8 * 5 / 8 - 9.0 / 4));
  static constexpr double nq = 1 / (2 * 9.0 / 4 * (9.0 / 4 - 5.0 / 8 * 5 / 8));
  static constexpr float np0 = np, np1 = np * p, np2 = np * pp, nq0 = nq, nq1 = nq * q, nq2 = nq * qq;

  static inline void input(const Float (&d)[6], Float (&v)[6]) {
    const Float even_p = d[4] - qq * d[2], odd_p = p * (d[3] - qq * d[1]);
    const Float even_q = d[4] - pp * d[2], odd_q = q * (d[3] - pp * d[1]);
    v[0] = pp * qq * d[0] + (d[4] - (pp + qq) * d[2]);
    v[1] = even_p + odd_p;
    v[2] = even_p - odd_p;
    v[3] = even_q + odd_q;
    v[4] = even_q - odd_q;
    v[5] = pp * qq * d[1] + (d[5] - (pp + qq) * d[3]);
  }

  static inline void weight(const Float (&g)[3], Float (&u)[6]) {
    const Float even_p = np0 * g[0] + np2 * g[2], odd_p = np1 * g[1];
    const Float even_q = nq0 * g[0] + nq2 * g[2], odd_q = nq1 * g[1];
    u[0] = static_cast<float>(n0) * g[0];
    u[1] = even_p + odd_p;
    u[2] = even_p - odd_p;
    u[3] = even_q + odd_q;
    u[4] = even_q - odd_q;
    u[5] = g[2];
  }

  static inline void output(const Float (&m)[6], Float (&y)[4]) {
    const Float even_p = m[1] + m[2], odd_p = m[1] - m[2];
    const Float even_q = m[3] + m[4], odd_q = m[3] - m[4];
    y[0] = m[0] + (even_p + even_q);
    y[1] = p * odd_p + q * odd_q;
    y[2] = pp * even_p + qq * even_q;
    y[3] = p * pp * odd_p + (q * qq * odd_q + m[5]);
  }

  // The transposes, for gradients.

  static inline void output_transposed(const Float (&y)[4], Float (&m)[6]) {
    const Float even_p = y[0] + pp * y[2], odd_p = p * (y[1] + pp * y[3]);
    const Float even_q = y[0] + qq * y[2], odd_q = q * (y[1] + qq * y[3]);
    m[0] = y[0];
    m[1] = even_p + odd_p;
    m[2] = even_p - odd_p;
    m[3] = even_q + odd_q;
    m[4] = even_q - odd_q;
    m[5] = y[3];
  }

  static inline void weight_transposed(const Float (&u)[6], Float (&g)[3]) {
    const Float even_p = u[1] + u[2], odd_p = u[1] - u[2];
    const Float even_q = u[3] + u[4], odd_q = u[3] - u[4];
    g[0] = static_cast<float>(n0) * u[0] + (np0 * even_p + nq0 * even_q);
    g[1] = np1 * odd_p + nq1 * odd_q;
    g[2] = np2 * even_p + (nq2 * even_q + u[5]);
  }
};

}  // namespace
}  // namespace ddpm_fast::cpu
