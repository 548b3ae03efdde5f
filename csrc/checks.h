// What the ops' arguments must be, whatever the device. Values are not looked at: they may lie on one.
#pragma once

#include "common.h"
#include "layout.h"

namespace ddpm_fast {

// A 0-d or (B,) int64 tensor, contiguous.
inline Tensor checked_per_sample(const char* name, const Tensor& values, int64_t batch) {
  check(
      values.scalar_type() == ScalarType::Long && (values.numel() == 1 || values.numel() == batch), name,
      " must be int64, one or one per sample");
  return as_contiguous(values);
}

inline void check_like(const char* name, const Tensor& value, const Tensor& x, const char* x_name) {
  check(value.scalar_type() == x.scalar_type() && same_shape(value, x), name, " must be like ", x_name);
}

inline void check_q_sample(const Tensor& x0, const Tensor& table) {
  check(x0.dim() >= 1, "x0 must have a batch dimension");
  const ScalarType expected = x0.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(
      table.dim() == 2 && table.size(1) == 2 && table.scalar_type() == expected,
      "table must be (T, 2), float32 or with a float64 x0 float64");
}

inline void check_posterior_step(
    const Tensor& x, const Tensor& out, const Tensor& table, const OptionalTensor& noise,
    const OptionalTensor& seed, const OptionalTensor& image_index, const OptionalTensor& x0_prev,
    const OptionalTensor& clip_each) {
  const bool is_double = x.scalar_type() == ScalarType::Double;
  check(x.dim() >= 2 && out.dim() == x.dim(), "x must be (B, C, ...) and out like it");
  for (int64_t d = 0; d < x.dim(); ++d) {
    check(
        out.size(d) == x.size(d) || (d == 1 && out.size(d) == 2 * x.size(d)),
        "out must have x's shape or twice its channels");
  }
  check(
      out.scalar_type() == x.scalar_type() ||
          (x.scalar_type() == ScalarType::Float && out.scalar_type() != ScalarType::Double),
      "out must have x's dtype, or a half type beside a float32 x");
  check(
      table.dim() == 2 && (table.size(1) == 7 || (table.size(1) == 9 && out.size(1) == 2 * x.size(1))) &&
          table.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
      "table must be (N, 7), or (N, 9) with 2C channels of out; float32, with a float64 x float64");
  check(seed.has_value() == image_index.has_value(), "seed and image_index go together");
  check(
      !clip_each || (clip_each->scalar_type() == ScalarType::Float && clip_each->numel() == x.size(0)),
      "clip must be (B,) float32");
  if (noise) check_like("noise", *noise, x, "x");
  if (x0_prev) check_like("x0_prev", *x0_prev, x, "x");
}

inline void check_philox4x32_10(const Tensor& counter, const Tensor& key) {
  check(
      counter.dim() == 2 && counter.size(1) == 4 && key.dim() == 2 && key.size(1) == 2 &&
          key.size(0) == counter.size(0),
      "counter must be (n, 4) and key (n, 2)");
  check(
      counter.scalar_type() == ScalarType::Long && key.scalar_type() == ScalarType::Long,
      "counter and key must be int64");
}

}  // namespace ddpm_fast
