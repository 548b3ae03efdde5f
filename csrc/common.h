// What every op's binding shares, whatever the device: errors, dtypes, and where elements lie.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "dtype.h"

namespace ddpm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename Error, typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

// Python sees std::invalid_argument as ValueError, std::out_of_range as IndexError.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail<std::invalid_argument>(parts...);
}

inline Dtype dtype_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      fail<std::invalid_argument>(name, " must be float32, float64, bfloat16 or float16");
  }
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2; }

inline const char* at(const Tensor& x, Dtype dtype, int64_t element) {
  return static_cast<const char*>(x.const_data_ptr()) + element * size_of(dtype);
}

inline char* mutable_at(const Tensor& x, Dtype dtype, int64_t element) {
  return static_cast<char*>(x.mutable_data_ptr()) + element * size_of(dtype);
}

// torch::stable::contiguous goes through the dispatcher even where there is nothing to do.
inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

}  // namespace ddpm_fast
