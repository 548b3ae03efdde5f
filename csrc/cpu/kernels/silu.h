// SiLU, N registers together and stage by stage: the steps for one wait for each other longer than a
// processor looks ahead.
//
//   silu(y) = y / (1 + e^-y) = u / (-log2 e (1 + 2^u)),   u = -y log2 e
//
// The second form saves a multiplication where u comes as cheap as y.
#pragma once

#include <type_traits>

#include "vec.h"

namespace ddpm_fast::cpu {
namespace {

constexpr float kToLog2 = -1.44269504f;
constexpr float kSiluBound = 125;  // 2^u and its reciprocal are normal floats for |u| up to it

// Of 2^r: minimax polynomials to 9e-8 and, the rough one, 1e-4.
#if defined(__AVX512F__)  // r in [0, 1]
constexpr float kPower[] = {1.8775767e-3f, 8.9893397e-3f, 5.5826318e-2f,
                            2.4015361e-1f, 6.9315308e-1f, 9.9999994e-1f};
constexpr float kRoughPower[] = {7.8024521e-2f, 2.2606716e-1f, 6.9583356e-1f, 9.9992520e-1f};
#else  // r in [-1/2, 1/2]
constexpr float kPower[] = {1.3264724e-3f, 9.671513e-3f, 5.5507336e-2f, 2.4022242e-1f, 6.93147e-1f, 1.0f};
constexpr float kRoughPower[] = {5.5171669e-2f, 2.4261113e-1f, 6.9326097e-1f, 9.9992806e-1f};
#endif

// 2^u, times a constant. The coefficients are of 2^r's polynomial, that of the highest power first.
template <int N, int kTerms>
[[gnu::always_inline]] inline void power(
    const Float (&u)[N], float times, const float (&coefficients)[kTerms], Float (&sum)[N]) {
  Float r[N];
#if defined(__AVX512F__)
  for (int k = 0; k < N; ++k) r[k] = _mm512_reduce_ps(u[k], 1);  // u - floor(u)
#else
  Float shifted[N];
  for (int k = 0; k < N; ++k) shifted[k] = u[k] + kRoundMagic, r[k] = u[k] - (shifted[k] - kRoundMagic);
#endif
  for (int k = 0; k < N; ++k) sum[k] = broadcast(times * coefficients[0]);
  for (int term = 1; term < kTerms; ++term) {
    for (int k = 0; k < N; ++k) sum[k] = sum[k] * r[k] + times * coefficients[term];
  }
  for (int k = 0; k < N; ++k) {
#if defined(__AVX512F__)
    sum[k] = _mm512_scalef_ps(sum[k], u[k]);
#else
    // The integer sits in the magic number's low mantissa bits; shifting drops the rest of it.
    sum[k] = bit_cast<Float>(bit_cast<Int>(sum[k]) + (bit_cast<Int>(shifted[k]) << 23));
#endif
  }
}

template <int N, int kTerms>
[[gnu::always_inline]] inline void one_and_power(
    const Float (&u)[N], float times, const float (&coefficients)[kTerms], Float (&sum)[N]) {
  power(u, times, coefficients, sum);
  for (Float& v : sum) v += times;
}

// In place: of u that is at most kSiluBound either way (kBounded), or of any y. NaN stays, and where e^-y is
// past float's range silu(y) is 0 but for what no float32 sum would see. To float32's last digits; to 1.4e-4
// (AVX-512; else 4.5e-4) of its value for what is rounded to bfloat16, by up to 3.9e-3.
template <typename T, bool kBounded, int N>
[[gnu::always_inline]] inline void silu(Float (&x)[N]) {
  constexpr bool kRough = std::is_same_v<T, BFloat16>;
  constexpr float kTimes = kBounded ? kToLog2 : 1;
  Float u[N], d[N];
  for (int k = 0; k < N; ++k) u[k] = kBounded ? x[k] : x[k] * kToLog2;
#if defined(__AVX512F__)
  // An infinite power needs no bound where the estimate of the reciprocal, 0, is taken as it is.
  if constexpr (kRough) {
    one_and_power(u, kTimes, kRoughPower, d);
  } else {
    if constexpr (!kBounded) {
      for (int k = 0; k < N; ++k) u[k] = at_most(u[k], kSiluBound), x[k] = at_least(x[k], -kExpBound);
    }
    one_and_power(u, kTimes, kPower, d);
  }
  Float r[N];
  for (int k = 0; k < N; ++k) r[k] = _mm512_rcp14_ps(d[k]);
  if constexpr (!kRough) {  // a Newton step: a division takes as long as all the rest
    for (int k = 0; k < N; ++k) d[k] = 1.0f - d[k] * r[k];
    for (int k = 0; k < N; ++k) r[k] += r[k] * d[k];
  }
  for (int k = 0; k < N; ++k) x[k] *= r[k];
#else
  if constexpr (!kBounded) {
    for (int k = 0; k < N; ++k) {
      u[k] = at_least(at_most(u[k], kSiluBound), -kSiluBound), x[k] = at_least(x[k], -kExpBound);
    }
  }
  if constexpr (kRough) {
    one_and_power(u, kTimes, kRoughPower, d);
  } else {
    one_and_power(u, kTimes, kPower, d);
  }
  for (int k = 0; k < N; ++k) {
#if defined(__AVX2__)
    x[k] = kRough ? x[k] * _mm256_rcp_ps(d[k]) : x[k] / d[k];
#else
    x[k] /= d[k];
#endif
  }
#endif
}

}  // namespace
}  // namespace ddpm_fast::cpu
