// Spans of any floating dtype to and from float32.
#pragma once

#include "../kernels.h"
#include "vec.h"

namespace ddpm_fast::cpu {
namespace {

template <typename T>
inline void load_span(const T* from, float* to, int64_t n) {
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) store(to + k, load(from + k));
  if (k < n) store(to + k, load(from + k, n - k), n - k);
}

template <typename T>
inline void store_span(const float* from, T* to, int64_t n) {
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) store(to + k, load(from + k));
  if (k < n) store(to + k, load(from + k, n - k), n - k);
}

void load_any(Dtype dtype, const void* from, float* to, int64_t n) {
  switch (dtype) {
    case Dtype::kFloat:
      return load_span(static_cast<const float*>(from), to, n);
    case Dtype::kBFloat16:
      return load_span(static_cast<const BFloat16*>(from), to, n);
    case Dtype::kHalf:
      return load_span(static_cast<const Half*>(from), to, n);
    case Dtype::kDouble:
      for (int64_t k = 0; k < n; ++k) to[k] = static_cast<float>(static_cast<const double*>(from)[k]);
  }
}

void store_any(Dtype dtype, const float* from, void* to, int64_t n) {
  switch (dtype) {
    case Dtype::kFloat:
      return store_span(from, static_cast<float*>(to), n);
    case Dtype::kBFloat16:
      return store_span(from, static_cast<BFloat16*>(to), n);
    case Dtype::kHalf:
      return store_span(from, static_cast<Half*>(to), n);
    case Dtype::kDouble:
      for (int64_t k = 0; k < n; ++k) static_cast<double*>(to)[k] = from[k];
  }
}

}  // namespace
}  // namespace ddpm_fast::cpu
