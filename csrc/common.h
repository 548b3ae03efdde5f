// What every op's binding shares: argument checks, dtypes, and how work is split over threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>

#include "cpu/kernels.h"

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

inline cpu::Dtype dtype_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return cpu::Dtype::kFloat;
    case ScalarType::Double:
      return cpu::Dtype::kDouble;
    case ScalarType::BFloat16:
      return cpu::Dtype::kBFloat16;
    case ScalarType::Half:
      return cpu::Dtype::kHalf;
    default:
      fail<std::invalid_argument>(name, " must be float32, float64, bfloat16 or float16");
  }
}

inline int64_t size_of(cpu::Dtype dtype) {
  return dtype == cpu::Dtype::kDouble ? 8 : dtype == cpu::Dtype::kFloat ? 4 : 2;
}

inline const char* at(const Tensor& x, cpu::Dtype dtype, int64_t element) {
  return static_cast<const char*>(x.const_data_ptr()) + element * size_of(dtype);
}

inline char* mutable_at(const Tensor& x, cpu::Dtype dtype, int64_t element) {
  return static_cast<char*>(x.mutable_data_ptr()) + element * size_of(dtype);
}

// torch::stable::contiguous goes through the dispatcher even where there is nothing to do.
inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// A 0-d or (B,) int64 tensor, read by sample.
class PerSample {
 public:
  PerSample(const char* name, const Tensor& values, int64_t batch) : values_(as_contiguous(values)) {
    check(
        values_.scalar_type() == ScalarType::Long && (values_.numel() == 1 || values_.numel() == batch), name,
        " must be int64, one or one per sample");
    data_ = static_cast<const int64_t*>(values_.const_data_ptr());
    stride_ = values_.numel() == 1 ? 0 : 1;
  }

  int64_t operator[](int64_t sample) const { return data_[sample * stride_]; }

  void check_range(const char* name, int64_t rows) const {
    for (int64_t b = 0; b < values_.numel(); ++b) {
      if (data_[b] < 0 || data_[b] >= rows) {
        fail<std::out_of_range>(name, " must be in [0, ", rows - 1, "], got ", data_[b]);
      }
    }
  }

 private:
  Tensor values_;
  const int64_t* data_;
  int64_t stride_;
};

// f(sample, begin, end) over spans of each sample's elements; a span is at most `span` elements and starts at
// a multiple of it. Small work stays on one thread: waking another costs more.
template <typename F>
void parallel_spans(int64_t batch, int64_t elements, int64_t span, const F& f) {
  if (batch * elements == 0) return;
  const int64_t spans = (elements + span - 1) / span;
  constexpr int64_t kElementsPerThread = 32768;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::min(span, elements));
  torch::stable::parallel_for(0, batch * spans, grain, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t begin = k % spans * span;
      f(k / spans, begin, std::min(begin + span, elements));
    }
  });
}

}  // namespace ddpm_fast
