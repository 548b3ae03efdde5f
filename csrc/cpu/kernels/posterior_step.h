// One row of a sampler's table on one sample's span:
//
//   x0     = clip(p x + q out)
//   x_next = a x0 + b x + c out + d x0_prev + s noise,   s = x_from_noise exp(log_variance / 2)
//
// Reads x, out, and what the row uses of x0_prev, noise, the variance; writes x_next and x0 (if asked for).
// x_next may be x, x0 may be x0_prev. T is float (float32 arithmetic) or double.
#pragma once

#include "../kernels.h"
#include "vec.h"

namespace ddpm_fast::cpu {
namespace {

enum StepUses { kUsesOut = 1, kUsesHistory = 2, kUsesNoise = 4, kWritesX0 = 8 };

template <typename T, int kUses>
void step_span(const StepRow& row, const StepSpan<T>& span, int64_t n) {
  const T p = row.x0_from_x, q = row.x0_from_out, a = row.x_from_x0, b = row.x_from_x, c = row.x_from_out;
  const T d = row.x_from_x0_prev, s = row.x_from_noise, high = row.clip, low = -high;
  const T *x = span.x, *out = span.out, *x0_prev = span.x0_prev, *noise = span.noise;
  T *x_next = span.x_next, *x0 = span.x0;
#pragma GCC ivdep
  for (int64_t k = 0; k < n; ++k) {
    T clean = p * x[k] + q * out[k];
    clean = clean < low ? low : clean;  // in this order NaN stays
    clean = clean > high ? high : clean;
    T next = a * clean + b * x[k];
    if constexpr (kUses & kUsesOut) next += c * out[k];
    if constexpr (kUses & kUsesHistory) next += d * x0_prev[k];
    if constexpr (kUses & kUsesNoise) next += s * noise[k];
    if constexpr (kUses & kWritesX0) x0[k] = clean;
    x_next[k] = next;
  }
}

// noise times the standard deviation that the network chose between the row's two
inline void scale_noise(const StepRow& row, const float* v, const float* noise, float* scaled, int64_t n) {
  const float low = row.min_log, high = row.max_log;
  const auto scale = [&](Float v, Float noise) {
    const Float frac = (v + 1.0f) * 0.5f;
    const Float log_deviation = 0.5f * (frac * high + (1.0f - frac) * low);
    return exp<1>(at_most(at_least(log_deviation, -kExpBound), kExpBound)) * noise;
  };
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) store(scaled + k, scale(load(v + k), load(noise + k)));
  if (k < n) store(scaled + k, scale(load(v + k, n - k), load(noise + k, n - k)), n - k);
}

inline void scale_noise(const StepRow& row, const double* v, const double* noise, double* scaled, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    const double frac = (v[k] + 1) / 2;
    scaled[k] = __builtin_exp(0.5 * (frac * row.max_log + (1 - frac) * row.min_log)) * noise[k];
  }
}

template <typename T>
void posterior_step(const StepRow& row, const StepSpan<T>& whole, int64_t n) {
  using Run = void (*)(const StepRow&, const StepSpan<T>&, int64_t);
  static constexpr Run kRuns[16] = {step_span<T, 0>,  step_span<T, 1>,  step_span<T, 2>,  step_span<T, 3>,
                                    step_span<T, 4>,  step_span<T, 5>,  step_span<T, 6>,  step_span<T, 7>,
                                    step_span<T, 8>,  step_span<T, 9>,  step_span<T, 10>, step_span<T, 11>,
                                    step_span<T, 12>, step_span<T, 13>, step_span<T, 14>, step_span<T, 15>};
  const bool uses_noise = row.x_from_noise != 0;
  const Run run = kRuns
      [(row.x_from_out != 0 ? kUsesOut : 0) | (row.x_from_x0_prev != 0 ? kUsesHistory : 0) |
       (uses_noise ? kUsesNoise : 0) | (whole.x0 != nullptr ? kWritesX0 : 0)];
  if (!uses_noise || whole.log_variance_fraction == nullptr) return run(row, whole, n);

  constexpr int64_t kBlock = 512;
  T scaled[kBlock];
  for (int64_t k = 0; k < n; k += kBlock) {
    const int64_t count = n - k < kBlock ? n - k : kBlock;
    scale_noise(row, whole.log_variance_fraction + k, whole.noise + k, scaled, count);
    StepSpan<T> span = whole;
    span.x += k, span.out += k, span.x_next += k, span.noise = scaled;
    if (span.x0_prev != nullptr) span.x0_prev += k;
    if (span.x0 != nullptr) span.x0 += k;
    run(row, span, count);
  }
}

}  // namespace
}  // namespace ddpm_fast::cpu
